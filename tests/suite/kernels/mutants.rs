//! Mutation tests: a change of one labeled line in a kernel's source, which the kernel's check must
//! detect.
//!
//! A line is labeled `// mutant: NAME`, at its end or alone on the line before it; several names are
//! separated by commas. A mutant replaces a text that is there exactly once on that line, or deletes
//! the line. `docs/mutants.tsv` lists every mutant and the test that kills it; `docs/testing.md` counts them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Module, gather, lm_head, matmul, operations, queue, single};

/// A set of mutants of one kernel file, or of the headers it includes, and the check that kills them.
pub struct MutationSet {
    /// File stem in `kernels/`.
    pub kernel: &'static str,
    /// Macro instantiations to compile, of each macro named here; the others take time.
    pub only: &'static [&'static str],
    /// Label, text to replace (all of the line if empty), replacement.
    pub mutants: &'static [Mutant],
    /// Passes on the original kernels.
    pub check: fn(&Module),
}
pub type Mutant = (&'static str, &'static str, &'static str);

macro_rules! mutation_tests {
    ($($(#[$attribute:meta])* $test:ident: $mutants:path,)*) => {
        /// Name, whether only `scripts/test --all` runs it, and set of each test.
        const TESTS: &[(&str, bool, &MutationSet)] =
            &[$((stringify!($test), !stringify!($(#[$attribute])*).is_empty(), &$mutants)),*];
        $(
            #[test]
            $(#[$attribute])*
            fn $test() {
                kills_mutants(&$mutants);
            }
        )*
    };
}

mutation_tests! {
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    adamw_mutants_are_killed: operations::ADAMW,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    attention_decode_mutants_are_killed: operations::DECODE,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    attention_generic_mutants_are_killed: operations::GENERIC,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    attention_smallhead_mutants_are_killed: operations::SMALLHEAD,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    attention_smallhead_tf32_mutants_are_killed: operations::SMALLHEAD_TF32,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    cross_entropy_mutants_are_killed: operations::CROSS_ENTROPY,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    embedding_backward_mutants_are_killed: operations::EMBEDDING_BACKWARD,
    embedding_sort_mutants_are_killed: single::EMBEDDING_SORT,
    fill_mutants_are_killed: single::FILL,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    flash_attention_mutants_are_killed: operations::FLASH,
    gather_rows_mutants_are_killed: operations::GATHER_ROWS,
    gather_windows_mutants_are_killed: gather::GATHER_WINDOWS,
    grad_norm_mutants_are_killed: operations::GRAD_NORM,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    lce_mutants_are_killed: lm_head::LCE,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    lce_f16_mutants_are_killed: lm_head::LCE_F16,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    matmul_mutants_are_killed: matmul::MATMUL,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    muon_mutants_are_killed: operations::MUON,
    #[ignore = "minutes of compiling: scripts/test --all runs it"]
    rms_norm_backward_mutants_are_killed: operations::RMS_NORM_BACKWARD,
    rms_norm_mutants_are_killed: operations::RMS_NORM,
    rope_mutants_are_killed: operations::ROPE,
    step_queue_mutants_are_killed: queue::STEP_QUEUE,
    sum_pieces_mutants_are_killed: single::SUM_PIECES,
    swiglu_mutants_are_killed: operations::SWIGLU,
}

const MARK: &str = "// mutant: ";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Every header of `kernels/lib`, as a path in `kernels`.
fn headers() -> BTreeSet<String> {
    let names = fs::read_dir(folder().join("lib")).unwrap();
    names.map(|file| format!("lib/{}", file.unwrap().file_name().to_str().unwrap())).collect()
}

fn read(file: &str) -> Vec<String> {
    fs::read_to_string(folder().join(file)).unwrap().lines().map(String::from).collect()
}

fn labels(line: &str) -> impl Iterator<Item = &str> {
    line.split_once(MARK).into_iter().flat_map(|(_, names)| names.split(", "))
}

impl MutationSet {
    /// The file that a label is in, its lines after the mutation, and the line before and after it.
    fn apply(&self, &(label, from, to): &Mutant) -> (String, Vec<String>, [String; 2]) {
        let own = format!("{}.cu", self.kernel);
        let found: Vec<_> = std::iter::once(own)
            .chain(headers())
            .flat_map(|file| {
                let lines = read(&file);
                let at: Vec<_> =
                    (0..lines.len()).filter(|&i| labels(&lines[i]).any(|l| l == label)).collect();
                at.into_iter().map(move |at| (file.clone(), lines.clone(), at))
            })
            .collect();
        let [(file, mut lines, mut at)] = <[_; 1]>::try_from(found).unwrap_or_else(|found| {
            panic!("{}: {} lines are labeled {label}", self.kernel, found.len())
        });
        if lines[at].trim_start().starts_with(MARK) {
            at += 1;
        }
        let code = lines[at].split(MARK).next().unwrap().trim().to_string();
        let mutated = if from.is_empty() {
            String::new()
        } else {
            assert_eq!(code.matches(from).count(), 1, "{file}: {from:?} on the line of {label}");
            code.replace(from, to)
        };
        assert_ne!(code, mutated, "{file}: {label} changes nothing");
        lines[at].clone_from(&mutated);
        (file, lines, [code, mutated])
    }

    /// Whether a line instantiates a macro for an entry that the check does not need.
    fn is_left_out(&self, line: &str) -> bool {
        let line = line.trim_end_matches([' ', '\\']).trim_start();
        let same = |kept: &&&str| kept.split('(').next() == line.split('(').next();
        line.ends_with(')')
            && self.only.iter().any(|kept| same(&kept))
            && !self.only.contains(&line)
    }
}

/// Compiles the kernel with each mutant by itself, and demands that the check fails.
fn kills_mutants(set: &MutationSet) {
    let nvcc = match laam::kernels::BUILD.cuda.map(|nvcc| nvcc.path) {
        Ok(Some(nvcc)) if Path::new(nvcc).is_file() => nvcc,
        Ok(Some(nvcc)) => return eprintln!("SKIPPED: mutation tests, as {nvcc} is gone"),
        Ok(None) => return eprintln!("SKIPPED: mutation tests, because there is no nvcc"),
        Err(why) => return eprintln!("SKIPPED: mutation tests, because {why}"),
    };
    let mut survived = Vec::new();
    for mutant in set.mutants {
        let (label, ..) = mutant;
        let (mutated_file, mutated, _) = set.apply(mutant);
        let temporary = tempfile::tempdir().unwrap();
        fs::create_dir(temporary.path().join("lib")).unwrap();
        let source = format!("{}.cu", set.kernel);
        for file in headers().into_iter().chain([source.clone()]) {
            let lines = if file == mutated_file { mutated.clone() } else { read(&file) };
            let kept = lines.iter().filter(|line| !set.is_left_out(line));
            let text: String = kept.flat_map(|line| [line, "\n"]).collect();
            fs::write(temporary.path().join(file), text).unwrap();
        }
        let ptx = temporary.path().join("ptx");
        let mut command = Command::new(nvcc);
        command.args(["-ptx", "-arch=compute_80", "-O3", "-std=c++17", "-lineinfo", "-o"]);
        let output = command.arg(&ptx).arg(temporary.path().join(source)).output().unwrap();
        assert!(output.status.success(), "{}, {label}: {output:?}", set.kernel);
        let module = Module::from_ptx(&fs::read_to_string(&ptx).unwrap()).unwrap();
        if catch_unwind(AssertUnwindSafe(|| (set.check)(&module))).is_ok() {
            survived.push(label);
        }
    }
    assert!(survived.is_empty(), "{}: survived: {survived:?}", set.kernel);
}

/// Every label has a mutant, every mutant a label, `docs/mutants.tsv` is the list of them, and
/// `docs/testing.md` has their numbers.
#[test]
fn mutants_are_those_of_the_table() {
    const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/mutants.tsv");
    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/testing.md");
    const WRITE: &str = "LAAM_MUTANTS=write cargo test --test suite mutants_are_those";
    const BEGIN: &str = "<!-- mutants -->\n";
    const END: &str = "<!-- end -->";
    let mut used = BTreeSet::new();
    let mut text = format!("# written by {WRITE}\nfile\tmutant\tkilled by\tcode\tmutated\n");
    let mut counts =
        "| mutants of | number | killed by | run by |\n|---|---|---|---|\n".to_string();
    for (test, is_ignored, set) in TESTS {
        let mut files = BTreeSet::new();
        for mutant in set.mutants {
            let (file, _, [code, mutated]) = set.apply(mutant);
            writeln!(text, "{file}\t{}\t{test}\t{code}\t{mutated}", mutant.0).unwrap();
            files.insert(format!("`{file}`"));
            used.insert((file, mutant.0.to_string()));
        }
        let files = files.into_iter().collect::<Vec<_>>().join(", ");
        let by = if *is_ignored { "`scripts/test --all`" } else { "`scripts/test`" };
        writeln!(counts, "| {files} | {} | `{test}` | {by} |", set.mutants.len()).unwrap();
    }
    let number: usize = TESTS.iter().map(|(.., set)| set.mutants.len()).sum();
    writeln!(counts, "| all | {number} | | |").unwrap();
    let names = fs::read_dir(folder()).unwrap().map(|file| file.unwrap().file_name());
    let sources = names.filter_map(|name| Some(name.to_str()?.to_string()));
    let files =
        sources.filter(|name| Path::new(name).extension() == Some("cu".as_ref())).chain(headers());
    let labeled: BTreeSet<_> = files
        .flat_map(|file| {
            let names: Vec<_> = read(&file)
                .iter()
                .flat_map(|line| labels(line).map(String::from).collect::<Vec<_>>())
                .collect();
            names.into_iter().map(move |name| (file.clone(), name))
        })
        .collect();
    let without: Vec<_> = labeled.difference(&used).collect();
    assert!(without.is_empty(), "labels without a mutant: {without:?}");
    let page = fs::read_to_string(PAGE).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let counted = format!("{before}{BEGIN}{counts}{END}{after}");
    if std::env::var_os("LAAM_MUTANTS").is_some_and(|wish| wish == "write") {
        fs::write(TABLE, &text).unwrap();
        fs::write(PAGE, &counted).unwrap();
    } else {
        let table = fs::read_to_string(TABLE).unwrap_or_default();
        assert!(table == text, "docs/mutants.tsv is not the list of the mutants: {WRITE}");
        assert!(page == counted, "docs/testing.md does not have their numbers: {WRITE}");
    }
}
