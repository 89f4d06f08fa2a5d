//! SASS statistics of every kernel entry against the table in `docs/sass.tsv`: spills, lost vector
//! accesses and longer loops are detected without a GPU. The pages of `docs/kernels/` have its columns for
//! their entries.
//!
//! `scripts/sass --write` rewrites the table, then the pages. It is valid for one nvcc version; with another the
//! comparison is skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use laam::kernels::{BUILD, CUDA_MODULES, Nvcc};

use crate::kernels::accesses::{self, Accesses};

/// Counted quantities, and whether more, less or any of them is worse.
const COLUMNS: [(&str, Worse); 8] = [
    ("registers", Worse::More),
    ("stack", Worse::Any),    // bytes per thread
    ("local", Worse::Any),    // instructions on local memory: spills and arrays
    ("shared", Worse::More),  // static bytes per block
    ("wide", Worse::Less),    // 128-bit accesses to global memory
    ("mma", Worse::Less),     // matrix instructions
    ("loop", Worse::More),    // instructions of the longest innermost loop
    ("per_exp", Worse::More), // instructions per exponential in the innermost loop that has the fewest, or 0
];
type Row = [f64; COLUMNS.len()];
/// Rows by entry and architecture.
type Table = BTreeMap<(String, String), Row>;

#[derive(Clone, Copy, PartialEq)]
enum Worse {
    More,
    Less,
    Any,
}

/// Architectures of the table; a build for the GPU of its machine has more.
const TABLE_ARCHS: [&str; 2] = ["sm_80", "sm_90a"];
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/sass.tsv");
const REWRITE: &str = "scripts/sass --write";

/// cuobjdump of the toolkit, if the build has SASS for [`TABLE_ARCHS`], or `None` after a `SKIPPED` line.
fn disassembler() -> Option<(PathBuf, Nvcc)> {
    let skip = |why: &str| eprintln!("SKIPPED: SASS of the kernels, because {why}");
    let nvcc = match BUILD.cuda {
        Ok(nvcc) => nvcc,
        Err(why) => {
            skip(why);
            return None;
        }
    };
    let Some(path) = nvcc.path else {
        skip("the build took the shipped PTX");
        return None;
    };
    if !TABLE_ARCHS.iter().all(|arch| nvcc.archs.contains(&&arch[3..])) {
        skip("the build has no SASS for the architectures of the table: unset LAAM_CUDA_ARCHS");
        return None;
    }
    let tool = Path::new(path).with_file_name("cuobjdump");
    if !tool.is_file() || !tool.with_file_name("nvdisasm").is_file() {
        skip("cuobjdump and nvdisasm are not beside nvcc: scripts/setup-cuda installs them");
        return None;
    }
    Some((tool, nvcc))
}

/// Rows of the entries in a fatbin.
fn rows(tool: &Path, file: &Path) -> Table {
    let folder = tool.parent().unwrap();
    let mut command = Command::new(tool);
    command.env("PATH", folder).args(["-sass", "-res-usage"]).arg(file);
    let output = command.output().unwrap();
    assert!(output.status.success(), "cuobjdump: {output:?}");
    parse(&String::from_utf8(output.stdout).unwrap())
}

fn parse(text: &str) -> Table {
    let mut table = Table::new();
    let mut codes: BTreeMap<(String, String), Vec<&str>> = BTreeMap::new();
    let (mut arch, mut entry) = (String::new(), String::new());
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("arch = ") {
            arch = name.to_string();
        } else if let Some(name) = line.strip_prefix("code for ") {
            arch = name.to_string();
        } else if let Some(name) = line.strip_prefix("Function : ") {
            entry = name.to_string();
        } else if let Some(name) = line.strip_prefix("Function ") {
            entry = name.trim_end_matches(':').to_string();
        } else if line.starts_with("REG:") {
            let field = |name: &str| {
                let found = line.split_whitespace().find_map(|field| field.strip_prefix(name));
                found.unwrap_or_else(|| panic!("no {name} in {line}")).parse::<f64>().unwrap()
            };
            let row = [field("REG:"), field("STACK:"), 0.0, field("SHARED:"), 0.0, 0.0, 0.0, 0.0];
            table.insert((entry.clone(), arch.clone()), row);
        } else if line.starts_with("/*") && line.contains(';') {
            codes.entry((entry.clone(), arch.clone())).or_default().push(line);
        }
    }
    assert_eq!(table.len(), codes.len(), "entries with code, and those with resource usage");
    for (key, code) in codes {
        let row = table.get_mut(&key).unwrap_or_else(|| panic!("no resource usage of {key:?}"));
        let loops = innermost(&code);
        count(&code, row);
        row[6] = loops.iter().map(Vec::len).max().unwrap_or(0) as f64;
        row[7] = per_exponential(&loops);
    }
    table
}

/// Counts the instructions of an entry, except loop lengths.
fn count(code: &[&str], row: &mut Row) {
    for (_, opcode) in code.iter().map(|line| instruction(line)) {
        let parts: Vec<_> = opcode.split('.').collect();
        row[2] += f64::from(["LDL", "STL"].contains(&parts[0]));
        let global = ["LDG", "STG", "LDGSTS", "LD", "ST"].contains(&parts[0]);
        row[4] += f64::from(global && parts.contains(&"128"));
        row[5] += f64::from(["HMMA", "HGMMA", "IMMA", "DMMA"].contains(&parts[0]));
    }
}

/// Address and words from the opcode on of a line like
/// `/*00d0*/ @P0 BRA 0x1df0 ; /* ... */`.
fn split(line: &str) -> (u64, impl Iterator<Item = &str>) {
    let (place, rest) = line[2..].split_once("*/").unwrap();
    let words = rest.split(';').next().unwrap().split_whitespace();
    let words = words.filter(|word| !word.starts_with(['@', '{']));
    (u64::from_str_radix(place, 16).unwrap(), words)
}

fn instruction(line: &str) -> (u64, &str) {
    let (place, mut words) = split(line);
    (place, words.next().unwrap_or_default())
}

/// Lines of each innermost loop.
fn innermost<'a>(code: &'a [&'a str]) -> Vec<Vec<&'a str>> {
    let mut backward = Vec::new();
    for line in code {
        let (place, mut words) = split(line);
        if words.next().is_some_and(|opcode| opcode.split('.').next() == Some("BRA")) {
            let target = words.filter_map(|word| {
                let digits = word.trim_start_matches("`(").strip_prefix("0x")?;
                u64::from_str_radix(digits.trim_end_matches([')', ',']), 16).ok()
            });
            // The code ends with a branch to itself.
            backward.extend(target.filter(|&target| target < place).map(|target| (target, place)));
        }
    }
    let inside = |a: (u64, u64), b: (u64, u64)| a != b && b.0 <= a.0 && a.1 <= b.1;
    let body = |&(from, to): &(u64, u64)| {
        let lines = code.iter().filter(|line| (from..=to).contains(&instruction(line).0));
        lines.copied().collect()
    };
    backward
        .iter()
        .filter(|&&outer| !backward.iter().any(|&inner| inside(inner, outer)))
        .map(body)
        .collect()
}

/// Instructions per exponential, to two digits, in the innermost loop that has the fewest; 0 without one. In
/// attention, whose kernels compute one exponential per query-key pair, instructions per pair.
fn per_exponential(loops: &[Vec<&str>]) -> f64 {
    let each = loops.iter().filter_map(|body| {
        let exponential = |line: &&&str| instruction(line).1 == "MUFU.EX2";
        let count = body.iter().filter(exponential).count();
        (count > 0).then(|| (100.0 * body.len() as f64 / count as f64).round() / 100.0)
    });
    each.min_by(f64::total_cmp).unwrap_or(0.0)
}

/// All kernels of this build, disassembled once.
fn built(tool: &Path) -> &'static Table {
    static BUILT: OnceLock<Table> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let mut all = Table::new();
        for module in CUDA_MODULES {
            let file = folder.path().join(module.name);
            fs::write(&file, module.fatbin).unwrap();
            let is_listed = |(_, arch): &(String, String)| TABLE_ARCHS.contains(&arch.as_str());
            all.extend(rows(tool, &file).into_iter().filter(|(key, _)| is_listed(key)));
        }
        all
    })
}

fn head(nvcc: &Nvcc) -> String {
    let names: Vec<_> = COLUMNS.iter().map(|(name, _)| *name).collect();
    format!("# nvcc {}; written by {REWRITE}\nentry\tarch\t{}\n", nvcc.version, names.join("\t"))
}

fn write(table: &Table, nvcc: &Nvcc) -> String {
    let mut text = head(nvcc);
    for ((entry, arch), row) in table {
        let numbers = row.map(|number| number.to_string()).join("\t");
        writeln!(text, "{entry}\t{arch}\t{numbers}").unwrap();
    }
    text
}

fn read(text: &str) -> Table {
    let row = |line: &str| {
        let fields: Vec<_> = line.split('\t').collect();
        let numbers: Vec<f64> = fields[2..].iter().map(|field| field.parse().unwrap()).collect();
        ((fields[0].to_string(), fields[1].to_string()), numbers.try_into().unwrap())
    };
    text.lines().skip(2).map(row).collect()
}

fn is_rewritten() -> bool {
    std::env::var_os("LAAM_SASS").is_some_and(|wish| wish == "write")
}

/// First and last line of a page's generated table; PREFIXES are of the entries in it, divided by blanks.
const BEGIN: &str = "<!-- sass: ";
const END: &str = "<!-- end -->";

/// Table of the entries that begin with one of the prefixes, and their names. Entries that differ in the
/// dtype alone share a row if they have the same numbers.
fn page_table<'a>(table: &'a Table, accesses: &Accesses, prefixes: &str) -> (String, Vec<&'a str>) {
    let arch = TABLE_ARCHS[1];
    // Sectors and shared-memory passes per ideal one; 0 without accesses, or if no case launches the entry.
    let ratios = |entry: &str| {
        let [sectors, ideal_sectors, passes, ideal_passes] =
            accesses::row(accesses, entry).copied().unwrap_or_default();
        [accesses::ratio(sectors, ideal_sectors), accesses::ratio(passes, ideal_passes)]
    };
    let listed: Vec<_> = table
        .iter()
        .filter(|((entry, a), _)| a == arch && prefixes.split(' ').any(|p| entry.starts_with(p)))
        .map(|((entry, _), row)| {
            let dtype = ["_bf16", "_f16", "_f32"].into_iter().find(|dtype| entry.ends_with(dtype));
            let stem = entry.strip_suffix(dtype.unwrap_or("")).unwrap();
            let [sectors, passes] = ratios(entry);
            let cells = [row[0], row[3], row[4], row[5], row[6], row[7], sectors, passes];
            (entry.as_str(), stem, dtype, cells)
        })
        .collect();
    let mut text = format!(
        "| entry, {arch} | registers | static shared memory | 128-bit | mma | loop | per exponential | sectors | passes |\n\
         |---|---|---|---|---|---|---|---|---|\n"
    );
    for same in listed.chunk_by(|a, b| (a.1, a.3) == (b.1, b.3)) {
        let [(_, stem, _, cells), ..] = same else { unreachable!("chunks are not empty") };
        let dtypes: Vec<_> = same.iter().filter_map(|entry| Some(&entry.2?[1..])).collect();
        let name = match dtypes.as_slice() {
            [] => (*stem).to_string(),
            [dtype] => format!("{stem}_{dtype}"),
            several => format!("{stem}_{{{}}}", several.join(",")),
        };
        let shown = |number: f64| if number == 0.0 { "-".to_string() } else { number.to_string() };
        let cells = cells.map(shown).join(" | ");
        writeln!(text, "| `{name}` | {cells} |").unwrap();
    }
    (text, listed.iter().map(|entry| entry.0).collect())
}

/// Every entry is in the generated table of exactly one page of `docs/kernels/`, with the numbers of
/// `docs/sass.tsv` and `docs/accesses.tsv`.
#[test]
fn kernel_pages_have_the_numbers_of_the_sass_table() {
    let table = read(&fs::read_to_string(TABLE).unwrap());
    let accesses = accesses::read();
    let mut missing: BTreeSet<&str> = table.keys().map(|(entry, _)| entry.as_str()).collect();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kernels");
    for page in fs::read_dir(folder).unwrap().map(|page| page.unwrap().path()) {
        let text = fs::read_to_string(&page).unwrap();
        let mut parts = text.split(BEGIN);
        let mut expected = parts.next().unwrap().to_string();
        for part in parts {
            let (prefixes, rest) = part.split_once(" -->\n").unwrap();
            let (_, after) = rest.split_once(END).unwrap();
            let (rows, entries) = page_table(&table, &accesses, prefixes);
            for entry in entries {
                assert!(missing.remove(entry), "{}: {entry} is in two tables", page.display());
            }
            write!(expected, "{BEGIN}{prefixes} -->\n{rows}{END}{after}").unwrap();
        }
        if is_rewritten() {
            fs::write(&page, expected).unwrap();
        } else {
            assert!(
                text == expected,
                "{} is not as docs/sass.tsv and docs/accesses.tsv: {REWRITE}",
                page.display()
            );
        }
    }
    assert!(missing.is_empty(), "entries on no page: {missing:?}");
}

/// Regressions, one sentence each.
fn worse(old: &Table, new: &Table) -> Vec<String> {
    let mut sentences = Vec::new();
    for ((entry, arch), row) in new {
        let known = old.get(&(entry.clone(), arch.clone()));
        if known.is_none() {
            sentences.push(format!("{entry} on {arch} is not in the table: {REWRITE} adds it"));
        }
        for (column, (name, rule)) in COLUMNS.into_iter().enumerate() {
            let now = row[column];
            if rule == Worse::Any {
                if now != 0.0 {
                    sentences.push(format!("{entry} on {arch}: {name} is {now}, must be 0"));
                }
                continue;
            }
            let Some(was) = known.map(|row| row[column]) else { continue };
            if (rule == Worse::More && now > was) || (rule == Worse::Less && now < was) {
                sentences.push(format!(
                    "{entry} on {arch}: {name} was {was} and is {now}, which is worse; if that is \
                     intended, {REWRITE} records it"
                ));
            }
        }
    }
    sentences
}

#[test]
fn sass_is_no_worse_than_the_table() {
    let Some((tool, nvcc)) = disassembler() else { return };
    let new = built(&tool);
    assert!(!new.is_empty());
    if is_rewritten() {
        fs::write(TABLE, write(new, &nvcc)).unwrap();
    }
    let text = fs::read_to_string(TABLE).unwrap();
    if !text.starts_with(&head(&nvcc)) {
        let line = text.lines().next().unwrap_or_default();
        eprintln!("SKIPPED: docs/sass.tsv is for another compiler ({line}) than {}", nvcc.version);
        return;
    }
    let old = read(&text);
    let mut sentences = worse(&old, new);
    for (entry, arch) in old.keys().filter(|key| !new.contains_key(key)) {
        sentences.push(format!("{entry} on {arch} is only in the table: {REWRITE} removes it"));
    }
    assert!(sentences.is_empty(), "\n{}\n", sentences.join("\n"));
    let better = new.iter().filter(|(key, row)| old[*key] != **row).count();
    if better > 0 {
        eprintln!("{better} entries are better than docs/sass.tsv: {REWRITE} records it");
    }
}

/// head_dim 2, several rows per lane or row blocks per warp: forward, dq, dk and dv.
#[test]
fn attention_smallhead_takes_few_instructions_per_pair() {
    let Some((tool, _)) = disassembler() else { return };
    let table = built(&tool);
    for (name, several, [forward, backward]) in [
        ("attention_smallhead", [4, 4, 4], [7.0, 20.0]),
        ("attention_smallhead_tf32", [4, 4, 8], [3.0, 6.5]),
    ] {
        for arch in TABLE_ARCHS {
            let passes = ["", "_backward_dq", "_backward_dkdv"].into_iter().zip(several);
            let entry = |(pass, rows)| (format!("{name}{pass}_2_{rows}_bf16"), arch.to_string());
            let counted: Vec<_> = passes.map(|pass| table[&entry(pass)][7]).collect();
            eprintln!("{name} on {arch}: instructions per pair {counted:.2?}");
            assert!(counted[0] <= forward, "{name} on {arch}: {counted:?}");
            assert!(counted[1] + counted[2] <= backward, "{name} on {arch}: {counted:?}");
        }
    }
}

/// Compiles a mutated kernel file for sm_90a.
fn patched(nvcc: &Nvcc, name: &str, patch: impl Fn(String) -> String, flags: &[&str]) -> PathBuf {
    let folder = tempfile::tempdir().unwrap().keep();
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let source = folder.join(format!("{name}.cu"));
    let text = fs::read_to_string(kernels.join(format!("{name}.cu"))).unwrap();
    fs::write(&source, patch(text)).unwrap();
    let fatbin = folder.join("fatbin");
    let mut command = Command::new(nvcc.path.unwrap());
    command
        .args(["-fatbin", "-gencode=arch=compute_90a,code=sm_90a", "-O3", "-std=c++17"])
        .args(flags);
    command.arg("-I").arg(&kernels).arg("-o").arg(&fatbin).arg(&source);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    fatbin
}

#[test]
fn spills_and_lost_vector_accesses_are_worse() {
    let Some((tool, nvcc)) = disassembler() else { return };
    let judged = |patch: &dyn Fn(String) -> String, flags: &[&str]| {
        let fatbin = patched(&nvcc, "swiglu", patch, flags);
        let table = rows(&tool, &fatbin);
        fs::remove_dir_all(fatbin.parent().unwrap()).unwrap();
        table
    };
    let good = judged(&|text| text, &[]);
    assert!(worse(&good, &good).is_empty(), "{:?}", worse(&good, &good));
    assert!(good.values().all(|row| row[4] > 0.0 && row[6] > 0.0), "{good:?}");

    let spilling =
        judged(&|text| text.replace("__launch_bounds__(BLOCK_THREADS)", ""), &["-maxrregcount=16"]);
    let sentences = worse(&good, &spilling).join("\n");
    let key = ("swiglu_backward_bf16".to_string(), "sm_90a".to_string());
    let local = spilling[&key][2];
    assert!(local > 0.0 && spilling[&key][1] > 0.0, "the mutant does not spill: {spilling:?}");
    let sentence = format!("swiglu_backward_bf16 on sm_90a: local is {local}, must be 0");
    assert!(sentences.contains(&sentence), "{sentences}");

    let scalar = judged(&|text| text.replace("inter % VEC<T> == 0", "false"), &[]);
    let sentences = worse(&good, &scalar).join("\n");
    let was = good[&key][4];
    let sentence =
        format!("swiglu_backward_bf16 on sm_90a: wide was {was} and is 0, which is worse");
    assert!(sentences.contains(&sentence) && sentences.contains(REWRITE), "{sentences}");
}
