//! Global-memory sectors and shared-memory passes of every entry that the cases of `laam check` launch, against
//! the table in `docs/accesses.tsv`: uncoalesced accesses and bank conflicts are detected without a GPU.
//!
//! A sector is 32 bytes; a pass serves one word per bank. The ideal is what coalesced accesses, or accesses without
//! bank conflicts, of the same lanes would need. An f16 entry has the addresses of the bf16 one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::{Arc, Mutex};

use laam::backend::gpu::AttentionChoice;
use ptx_race::AccessSpace;

use super::*;

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/accesses.tsv");
const REWRITE: &str = "scripts/sass --write";
const HEAD: &str = "# small cases of laam check; written by scripts/sass --write\n\
                    entry\tsectors\tideal_sectors\tpasses\tideal_passes\n";

/// Sectors, ideal sectors, passes, ideal passes.
type Row = [u64; 4];
/// Rows by entry.
pub type Accesses = BTreeMap<String, Row>;

/// Accesses of all launches of the cases.
fn count() -> Accesses {
    let counted = Arc::new(Mutex::new(Accesses::new()));
    let configurations = [
        (Dtype::F32, AttentionChoice::Auto, false),
        (Dtype::Bf16, AttentionChoice::Auto, false),
        (Dtype::Bf16, AttentionChoice::NoTensorCores, false),
        (Dtype::F32, AttentionChoice::Generic, true),
        (Dtype::Bf16, AttentionChoice::Generic, true),
    ];
    for (at, (dtype, attention, generic)) in configurations.into_iter().enumerate() {
        let options = Options {
            attention,
            generic_lm_head: generic,
            own_matmul: generic,
            ..Options::new(dtype)
        };
        let observed = counted.clone();
        let open = move || {
            let mut sim =
                Sim::new(ptx_race::Options { profile: true, ..ptx_race::Options::default() })?;
            let observed = observed.clone();
            sim.observe(Arc::new(move |launch, stats| {
                let mut observed = observed.lock().unwrap();
                let row = observed.entry(launch.kernel.name().to_string()).or_default();
                for access in &stats.profile {
                    let first = if access.space == AccessSpace::Global { 0 } else { 2 };
                    row[first] += access.transactions;
                    row[first + 1] += access.ideal;
                }
            }));
            Ok(sim)
        };
        let backend = mutating_on(open, Mutation::Launch("", |_| {}), options).0;
        // What the options do not change is counted once per dtype.
        let changed = |name: &str| {
            let attends = name.starts_with("attention") && name != "attention_decode";
            let matmul = name.starts_with("linear") || name == "fused_linear_cross_entropy";
            at < 2 || attends || (generic && matmul)
        };
        for case in cases(Size::Small, dtype, 1, changed) {
            // Other values have the same addresses, and the generic kernels the same for any batch.
            let repeats = case.shape.contains("large scores");
            if !(repeats || generic && case.shape.starts_with("67 x")) {
                case.run(&backend, 1).unwrap();
            }
        }
    }
    Accesses::clone(&counted.lock().unwrap())
}

/// The table's row of an entry; `None` if no case launches it.
pub fn row<'a>(table: &'a Accesses, entry: &str) -> Option<&'a Row> {
    table.get(&entry.replace("_f16", "_bf16"))
}

pub fn read() -> Accesses {
    let text = fs::read_to_string(TABLE).unwrap();
    assert!(text.starts_with(HEAD), "docs/accesses.tsv: {REWRITE}");
    let row = |line: &str| {
        let (entry, numbers) = line.split_once('\t').unwrap();
        let numbers: Vec<u64> = numbers.split('\t').map(|number| number.parse().unwrap()).collect();
        (entry.to_string(), numbers.try_into().unwrap())
    };
    text.lines().skip(2).map(row).collect()
}

/// Transactions per ideal one, to two digits.
pub fn ratio(transactions: u64, ideal: u64) -> f64 {
    if ideal == 0 { 0.0 } else { (100.0 * transactions as f64 / ideal as f64).round() / 100.0 }
}

/// Regressions, one sentence each.
fn worse(old: &Accesses, new: &Accesses) -> Vec<String> {
    let mut sentences = Vec::new();
    for (entry, now) in new {
        let Some(was) = old.get(entry) else {
            sentences.push(format!("{entry} is not in the table: {REWRITE} adds it"));
            continue;
        };
        for (first, what) in [(0, "sectors"), (2, "shared-memory passes")] {
            let [was, now] = [was, now].map(|row| ratio(row[first], row[first + 1]));
            if now > was {
                sentences.push(format!(
                    "{entry}: {what} were {was} per ideal one and are {now}, which is worse; if that is \
                     intended, {REWRITE} records it"
                ));
            }
        }
    }
    for entry in old.keys().filter(|entry| !new.contains_key(*entry)) {
        sentences.push(format!("{entry} is only in the table: {REWRITE} removes it"));
    }
    sentences
}

#[test]
fn accesses_are_no_worse_than_the_table() {
    if let Err(why) = laam::kernels::BUILD.cuda {
        return eprintln!("SKIPPED: memory accesses of the kernels, because {why}");
    }
    let new = count();
    if std::env::var_os("LAAM_SASS").is_some_and(|wish| wish == "write") {
        let mut text = HEAD.to_string();
        for (entry, [sectors, ideal_sectors, passes, ideal_passes]) in &new {
            writeln!(text, "{entry}\t{sectors}\t{ideal_sectors}\t{passes}\t{ideal_passes}")
                .unwrap();
        }
        fs::write(TABLE, text).unwrap();
    }
    let sentences = worse(&read(), &new);
    assert!(sentences.is_empty(), "\n{}\n", sentences.join("\n"));
}

#[test]
fn more_sectors_or_passes_than_the_table_has_are_told() {
    let table = |row| Accesses::from([("swiglu_f32".to_string(), row)]);
    let old = table([120, 100, 64, 32]);
    assert_eq!(worse(&old, &table([240, 200, 32, 32])), Vec::<String>::new());
    for (row, said) in
        [([130, 100, 64, 32], "sectors were 1.2"), ([120, 100, 65, 32], "passes were 2 ")]
    {
        let sentences = worse(&old, &table(row));
        assert!(sentences.len() == 1 && sentences[0].contains(said), "{sentences:?}");
    }
    assert_eq!(worse(&old, &Accesses::new()).len(), 1);
    assert_eq!(worse(&Accesses::new(), &old).len(), 1);
}
