//! Exchanges between ranks, timed and checked, with the bandwidths of NVIDIA's nccl-tests.

use std::time::Instant;

use crate::collective::Group;
use crate::device::{Device, Launch};
use crate::error;
use crate::kernels::families;
use crate::kernels::geometry::BLOCK_THREADS;
use crate::llama::slices::SumOrder;

/// One exchange at one size.
#[derive(Clone, Debug)]
pub struct CollectiveTiming {
    /// Name of the exchange.
    pub name: &'static str,
    /// Bytes of the whole buffer of a rank.
    pub bytes: usize,
    /// Elements of f32 in it.
    pub count: usize,
    /// Time of the slowest rank, the fastest of several.
    pub seconds: f64,
    /// `bytes / seconds`, in bytes per second.
    pub algbw: f64,
    /// Bandwidth of one link: algbw times (n-1)/n, or 2 (n-1)/n for an all-reduce.
    pub busbw: f64,
}

/// The engine's own sum.
const NATIVE: &str = "native_all_reduce";

/// Timed exchanges: name, and the factor of nccl-tests in units of (n-1)/n.
const COLLECTIVES: [(&str, f64); 5] =
    [("all_to_all", 1.0), ("all_gather", 1.0), ("reduce", 1.0), ("all_reduce", 2.0), (NATIVE, 2.0)];

/// Value of element `at` of rank `rank`: sums of it are exact in f32.
fn value(rank: usize, at: usize) -> f32 {
    ((at * 7 + rank * 13) % 64) as f32
}

/// Times every exchange at a size, `rounds` times; with `native`, also the engine's own all-reduce.
///
/// # Errors
/// An exchange fails, or its result is wrong.
pub fn time(
    group: &Group,
    bytes: usize,
    rounds: usize,
    native: bool,
) -> anyhow::Result<Vec<CollectiveTiming>> {
    let ranks = group.size();
    // As many elements for each rank.
    let count = (bytes / 4).next_multiple_of(ranks).max(ranks);
    let piece = count / ranks;
    let mine: Vec<f32> = (0..count).map(|at| value(group.rank(), at)).collect();
    let sums: Vec<f32> =
        (0..count).map(|at| (0..ranks).map(|rank| value(rank, at)).sum()).collect();
    let own = group.rank() * piece..(group.rank() + 1) * piece;
    let order = SumOrder::new(ranks);
    let mut all = vec![0.0f32; count];
    let mut timings = Vec::new();
    for (name, factor) in COLLECTIVES {
        let mut fastest = f64::INFINITY;
        let mut is_there = native || name != NATIVE;
        if !is_there {
            continue;
        }
        for _ in 0..rounds.max(1) {
            all.copy_from_slice(&mine);
            // All ranks begin together.
            group.any(false)?;
            let begin = Instant::now();
            is_there = execute(group, name, &mine, &mut all, piece, order)?;
            let seconds = begin.elapsed().as_secs_f64();
            if !is_there {
                break;
            }
            let is_right = match name {
                "all_to_all" => {
                    (0..count).all(|at| all[at] == value(at / piece, own.start + at % piece))
                }
                "all_gather" => (0..count).all(|at| all[at] == value(at / piece, at)),
                "reduce" => all[..piece] == sums[own.clone()],
                _ => all == sums,
            };
            if !is_right {
                return Err(error::group(
                    format!("rank {}: {name} of {bytes} bytes gave wrong values", group.rank()),
                    "try another MPI library: laam doctor shows which there are",
                ));
            }
            let seconds = group.gather_each(&seconds.to_le_bytes())?;
            let seconds = seconds.iter().filter_map(|bytes| bytes.as_slice().try_into().ok());
            fastest = fastest.min(seconds.map(f64::from_le_bytes).fold(0.0, f64::max));
        }
        if is_there {
            let algbw = (4 * count) as f64 / fastest;
            let busbw = algbw * factor * (ranks - 1) as f64 / ranks as f64;
            let (bytes, seconds) = (4 * count, fastest);
            timings.push(CollectiveTiming { name, bytes, count, seconds, algbw, busbw });
        }
    }
    Ok(timings)
}

/// [`time`] in the memory of devices, which joined the group: eager, and as a graph where exchanges may be
/// captured.
///
/// # Errors
/// As of [`time`].
pub fn time_on_devices(
    device: &mut dyn Device,
    bytes: usize,
    rounds: usize,
) -> anyhow::Result<Vec<CollectiveTiming>> {
    let group = device.group().clone();
    let ranks = group.size();
    let count = (bytes / 4).next_multiple_of(ranks).max(ranks);
    let piece = count / ranks;
    let mine: Vec<f32> = (0..count).map(|at| value(group.rank(), at)).collect();
    let order = SumOrder::new(ranks);
    let own = group.rank() * piece;
    let [from, into, sum] = [4 * count, 4 * count, 4 * piece].map(|bytes| device.alloc(bytes));
    let (from, into, sum) = (from?, into?, sum?);
    device.upload(from, bytemuck::cast_slice(&mine))?;
    let reduce = Launch {
        kernel: families::SUM_PIECES,
        grid: [piece.div_ceil(4 * BLOCK_THREADS).clamp(1, 2048) as u32, 1, 1],
        block: [BLOCK_THREADS as u32, 1, 1],
        shared: 0,
        args: vec![
            into.into(),
            into.plus(4 * piece).into(),
            sum.into(),
            (piece as u64).into(),
            (piece as u64).into(),
            (order.blocks as i32).into(),
            (order.width as i32).into(),
        ],
    };
    let execute = |device: &mut dyn Device, name: &str| match name {
        "all_gather" => device.all_gather(from.plus(4 * own), into, 4 * piece),
        "all_to_all" => device.all_to_all(from, into, 4 * piece),
        _ => {
            device.all_to_all(from, into, 4 * piece)?;
            // SAFETY: the kernel reads a piece of every rank from `into` and writes one to `sum`, which hold as
            // many.
            unsafe { device.launch(&reduce) }
        }
    };
    let mut timings = Vec::new();
    for (name, as_graph) in [
        ("all_to_all", "all_to_all, graph"),
        ("all_gather", "all_gather, graph"),
        ("reduce", "reduce, graph"),
    ] {
        // Kernels are loaded, and connections made.
        execute(device, name)?;
        let modes: &[bool] = if device.captures_exchanges() { &[false, true] } else { &[false] };
        for &captured in modes {
            let graph = if captured {
                device.begin_capture()?;
                let executed = execute(device, name);
                let graph = device.end_capture();
                executed?;
                Some(graph?)
            } else {
                None
            };
            let mut fastest = f64::INFINITY;
            for _ in 0..rounds.max(1) {
                device.memset(into, 0xff, 4 * count)?;
                device.synchronize()?;
                group.any(false)?;
                let begin = Instant::now();
                match graph {
                    Some(graph) => device.launch_graph(graph)?,
                    None => execute(device, name)?,
                }
                device.synchronize()?;
                let seconds = begin.elapsed().as_secs_f64();
                let (result, len) = if name == "reduce" { (sum, piece) } else { (into, count) };
                let mut all = vec![0.0f32; len];
                device.download(result, bytemuck::cast_slice_mut(&mut all))?;
                let expected = |at: usize| match name {
                    "all_to_all" => value(at / piece, own + at % piece),
                    "all_gather" => value(at / piece, at),
                    _ => (0..ranks).map(|rank| value(rank, own + at)).sum(),
                };
                if (0..len).any(|at| all[at] != expected(at)) {
                    return Err(error::group(
                        format!("rank {}: {name} of {bytes} bytes gave wrong values", group.rank()),
                        "LAAM_NCCL=off exchanges through the hosts instead",
                    ));
                }
                let seconds = group.gather_each(&seconds.to_le_bytes())?;
                let seconds = seconds.iter().filter_map(|bytes| bytes.as_slice().try_into().ok());
                fastest = fastest.min(seconds.map(f64::from_le_bytes).fold(0.0, f64::max));
            }
            let algbw = (4 * count) as f64 / fastest;
            let busbw = algbw * (ranks - 1) as f64 / ranks as f64;
            let name = if captured { as_graph } else { name };
            let (bytes, seconds) = (4 * count, fastest);
            timings.push(CollectiveTiming { name, bytes, count, seconds, algbw, busbw });
        }
    }
    [from, into, sum].into_iter().try_for_each(|at| device.free(at))?;
    Ok(timings)
}

/// Executes one exchange; false if the engine has none of this name.
fn execute(
    group: &Group,
    name: &str,
    mine: &[f32],
    all: &mut [f32],
    piece: usize,
    order: SumOrder,
) -> anyhow::Result<bool> {
    let own = group.rank() * piece..(group.rank() + 1) * piece;
    let exchange = |all: &mut [f32]| {
        group.all_to_all(bytemuck::cast_slice(mine), bytemuck::cast_slice_mut(all))
    };
    let gather = |mine: &[f32], all: &mut [f32]| {
        group.all_gather(bytemuck::cast_slice(mine), bytemuck::cast_slice_mut(all))
    };
    match name {
        "all_to_all" => exchange(all)?,
        "all_gather" => gather(&mine[own], all)?,
        "reduce" => {
            exchange(all)?;
            order.add(all, piece);
        }
        "all_reduce" => {
            exchange(all)?;
            order.add(all, piece);
            let sum = all[..piece].to_vec();
            gather(&sum, all)?;
        }
        _ => return group.native_all_reduce(all),
    }
    Ok(true)
}
