//! Plans the memory of a training step without running it: `cargo run --example memory_plan -- 124m 4`.

use laam::llama::{Recompute, step};
use laam::model::{Layout, preset};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_else(|| "124m".to_string());
    let batch = args.next().map_or(Ok(1), |batch| batch.parse())?;
    let config = preset(&name)?;
    let layout = Layout::new(&config);
    let seq_len = config.max_position_embeddings;

    // Forward and backward of one micro-batch: a list of typed ops over named buffers.
    let program = step::training(&config, &layout, batch, seq_len, Recompute::None).program;
    let flops: usize = program.costs(layout.len).map(|(_, cost)| cost.flops).sum();
    println!("{name}: {} parameters, batch {batch}, seq_len {seq_len}", config.parameter_count());
    println!("{} ops, {:.1} GFLOPs", program.ops.len(), flops as f64 / 1e9);
    // Buffers share one block by their live ranges. Activations take two bytes each in bfloat16.
    let unshared: usize = program.buffers.iter().map(|info| info.len * info.kind.size(2)).sum();
    let plan = program.byte_plan(2);
    println!("activations: {} MB of {} MB", plan.bytes >> 20, unshared >> 20);
    Ok(())
}
