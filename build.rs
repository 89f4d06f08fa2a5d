//! Compiles `kernels/*.cu`: each to one fatbin for GPUs and to PTX for the simulator.
//!
//! Without nvcc the program contains the shipped PTX, `kernels/prebuilt`, which the driver compiles for
//! the GPU. Without the features `cuda` and `sim` it has no kernels and runs on the CPU. Variables:
//!
//! - `LAAM_CUDA`: `auto` (the default: nvcc, else the shipped PTX), `require` (nvcc, else an error),
//!   `prebuilt` (the shipped PTX even if there is an nvcc), or `off` (no kernels)
//! - `LAAM_CUDA_ARCHS`: the architectures to make SASS for; by default `80,90a` and that of each GPU that
//!   nvidia-smi shows. The driver compiles PTX for all others
//! - `NVCC`: the compiler; searched for by default

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

use prebuilt::{ShippedKernels, ShippedModule};
use signature::Signature;

#[path = "src/kernels/prebuilt.rs"]
mod prebuilt;
#[path = "src/kernels/signature.rs"]
mod signature;

/// CUDA 12.0 is the first to know sm_90a.
const OLDEST: u32 = 12;
const INSTALL: &str = "scripts/setup-cuda installs nvcc without root rights";

/// What stops a build, in words for the person who started it.
type Outcome<T> = Result<T, String>;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rustc-env=LAAM_VERSION={}", version());
    if let Err(why) = build() {
        for line in why.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

/// The version and, in a release build, the commit: `0.1.0 (0123456789ab)`, with `-dirty` if a tracked
/// file differs from it. In other builds every commit would start a new one.
fn version() -> String {
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    if env::var("PROFILE").as_deref() != Ok("release") {
        return version;
    }
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = output.status.success().then(|| String::from_utf8(output.stdout).ok())??;
        Some(text.trim().to_string())
    };
    // Of this repository, not of one that this source lies in.
    let Some("") = git(&["rev-parse", "--show-prefix"]).as_deref() else { return version };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return version };
    let paths = ["HEAD", "logs/HEAD"].map(|name| git(&["rev-parse", "--git-path", name]));
    let sources = ["src", "crates", "Cargo.toml", "Cargo.lock"].map(|path| Some(path.to_string()));
    // A file that is not there would start a build each time.
    let exists = |path: &String| Path::new(path).exists();
    for path in paths.into_iter().chain(sources).flatten().filter(exists) {
        println!("cargo::rerun-if-changed={path}");
    }
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let dirty = if changed.is_none_or(|changed| changed.is_empty()) { "" } else { "-dirty" };
    format!("{version} ({commit}{dirty})")
}

/// Where the kernels come from.
enum Kernels {
    Compiled(Nvcc, Vec<String>),
    Shipped(ShippedKernels),
    /// None, and why.
    Left(String),
}

fn build() -> Outcome<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let given = var("LAAM_CUDA_ARCHS").map(|list| archs(&list)).transpose()?;
    let wanted = feature("CUDA") || feature("SIM");
    let kernels = match var("LAAM_CUDA").as_deref() {
        _ if !wanted => Kernels::Left("it was built without the features cuda and sim".into()),
        Some("off") => Kernels::Left("it was built with LAAM_CUDA=off".into()),
        Some("prebuilt") => {
            Kernels::Shipped(shipped().map_err(|why| format!("LAAM_CUDA=prebuilt, but {why}"))?)
        }
        None | Some("auto") => match (find()?, shipped()) {
            (Ok(nvcc), _) => Kernels::Compiled(nvcc, sources()?),
            (Err(_), Ok(manifest)) => Kernels::Shipped(manifest),
            (Err(why), Err(stale)) => {
                println!("cargo::warning=no CUDA kernels: {why}, and {stale}; {INSTALL}");
                Kernels::Left(format!("{why}, and {stale}"))
            }
        },
        Some("require") => {
            let nvcc = find()?.map_err(|why| format!("LAAM_CUDA=require, but {why}; {INSTALL}"))?;
            Kernels::Compiled(nvcc, sources()?)
        }
        Some(other) => {
            return Err(format!(
                "invalid LAAM_CUDA={other}: must be auto, require, prebuilt or off"
            ));
        }
    };
    let mut built = Vec::new();
    if let Kernels::Compiled(nvcc, names) = &kernels {
        built = given.unwrap_or_else(|| usual_archs(nvcc));
        compile(nvcc, names, &built, &out)?;
    }
    let mut text = generated(&kernels, &built);
    text += &tables(&signatures(&kernels, &out)?);
    text += &geometry()?;
    fs::write(out.join("kernels.rs"), text).map_err(|e| format!("writing kernels.rs: {e}"))
}

/// The kernels of each file: of the PTX of this build, else of the shipped one.
fn signatures(kernels: &Kernels, out: &Path) -> Outcome<Vec<Vec<Signature>>> {
    let shipped = |manifest: ShippedKernels| {
        manifest.modules.into_iter().map(|module| module.kernels).collect()
    };
    match kernels {
        Kernels::Compiled(_, names) => names
            .iter()
            .map(|name| {
                let path = out.join(format!("{name}.ptx"));
                let text =
                    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
                Ok(Signature::of_ptx(&text))
            })
            .collect(),
        Kernels::Shipped(manifest) => Ok(shipped(manifest.clone())),
        Kernels::Left(_) => Ok(shipped(manifest()?)),
    }
}

/// The manifest of the shipped PTX.
fn manifest() -> Outcome<ShippedKernels> {
    let text = fs::read_to_string(Path::new("kernels/prebuilt").join(prebuilt::MANIFEST));
    let manifest = text.ok().and_then(|text| ShippedKernels::parse(&text));
    manifest.ok_or_else(|| "kernels/prebuilt has no manifest that can be read".into())
}

/// Appends to a text.
fn append(text: &mut String, part: std::fmt::Arguments) {
    text.write_fmt(part).expect("a string takes all");
}

/// Rust tables of the kernels: each of them, and the families that they are instances of.
fn tables(modules: &[Vec<Signature>]) -> String {
    let (mut entries, mut families) = (String::new(), BTreeMap::<_, Vec<_>>::new());
    let kernels = modules
        .iter()
        .enumerate()
        .flat_map(|(at, kernels)| kernels.iter().map(move |kernel| (at, kernel)));
    let mut count = 0;
    for (index, (module, kernel)) in kernels.enumerate() {
        let Signature { name, parameters, max_threads } = kernel;
        append(
            &mut entries,
            format_args!(
                "    Entry {{ name: {name:?}, module: {module}, parameters: &{parameters:?}, \
             max_threads: {max_threads} }},\n"
            ),
        );
        let (family, numbers, dtype) = kernel.instance();
        families.entry(family.to_uppercase()).or_default().push((index, numbers, dtype));
        count = index + 1;
    }
    let mut constants = String::new();
    for (family, instances) in families {
        if let [(index, numbers, None)] = &instances[..]
            && numbers.is_empty()
        {
            append(
                &mut constants,
                format_args!("    pub const {family}: Kernel = Kernel({index});\n"),
            );
            continue;
        }
        let instance = |(index, numbers, dtype): &(usize, Vec<usize>, Option<&str>)| {
            let dtype =
                dtype.map(|name| format!("Dtype::{}{}", name[..1].to_uppercase(), &name[1..]));
            let dtype = dtype.map_or("None".into(), |dtype| format!("Some({dtype})"));
            format!("Instance {{ numbers: &{numbers:?}, dtype: {dtype}, kernel: Kernel({index}) }}")
        };
        let instances: Vec<String> = instances.iter().map(instance).collect();
        append(
            &mut constants,
            format_args!(
                "    pub static {family}: Family = Family {{ name: {:?}, instances: &[{}] }};\n",
                family.to_lowercase(),
                instances.join(", ")
            ),
        );
    }
    format!(
        "/// Every kernel, in the order of the files.\n\
         static ENTRIES: [Entry; {count}] = [\n{entries}];\n\
         /// The kernels by name: a [`Kernel`], or a [`Family`] of instances.\n\
         #[allow(missing_docs)]\n\
         pub mod families {{\n    use super::{{Dtype, Family, Instance, Kernel}};\n{constants}}}\n"
    )
}

/// The constants of `kernels/lib/geometry.cuh`, with their comments, as those of a Rust module.
fn geometry() -> Outcome<String> {
    let path = "kernels/lib/geometry.cuh";
    let text = fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let mut module = String::from("/// `kernels/lib/geometry.cuh`.\npub mod geometry {\n");
    let mut statement = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(comment) = line.strip_prefix("//") {
            append(&mut module, format_args!("    ///{comment}\n"));
            continue;
        }
        if line.is_empty() || line.starts_with('#') {
            // What a comment before a blank line says is of the file.
            if !module.trim_end().ends_with(['{', ';']) {
                let kept = module.rfind([';', '{']).map_or(0, |at| at + 2);
                module.truncate(kept);
            }
            continue;
        }
        statement += line;
        let Some(whole) = statement.strip_suffix(';') else { continue };
        let constant = whole.strip_prefix("constexpr int ").and_then(|rest| rest.split_once(" = "));
        let (name, value) =
            constant.ok_or_else(|| format!("{path}: {whole:?} is not a constexpr int"))?;
        let mut dimensions = name.split('[');
        let name = dimensions.next().unwrap_or_default();
        let mut kind = "usize".to_string();
        for dimension in dimensions.rev() {
            kind = format!("[{kind}; {}]", dimension.trim_end_matches(']'));
        }
        let value = value.replace('{', "[").replace('}', "]");
        append(&mut module, format_args!("    pub const {name}: {kind} = {value};\n"));
        statement.clear();
    }
    Ok(module + "}\n")
}

/// The shipped PTX, or why it cannot be used: it was made from other sources.
fn shipped() -> Outcome<ShippedKernels> {
    let manifest = manifest()?;
    let mut names: Vec<_> = manifest.modules.iter().map(|module| module.name.clone()).collect();
    names.sort();
    let is_current = |ShippedModule { name, hash, .. }: &ShippedModule| {
        prebuilt::source_hash(Path::new("kernels"), name).is_ok_and(|now| now == *hash)
    };
    if names == sources()? && manifest.modules.iter().all(is_current) {
        return Ok(manifest);
    }
    Err("kernels/prebuilt was made from other sources than kernels/ has: scripts/prebuild".into())
}

/// `80`, `90a`, and the architecture of each GPU of this machine that nvcc knows.
fn usual_archs(nvcc: &Nvcc) -> Vec<String> {
    let mut archs = vec!["80".to_string(), "90a".to_string()];
    let lines = |command: &mut Command| {
        let output = command.output().ok().filter(|output| output.status.success());
        let text = output.map_or_else(String::new, |output| {
            String::from_utf8_lossy(&output.stdout).into_owned()
        });
        text.lines().map(|line| line.trim().to_string()).collect::<Vec<_>>()
    };
    let query = ["--query-gpu=compute_cap", "--format=csv,noheader"];
    let present = lines(Command::new("nvidia-smi").args(query));
    if present.is_empty() {
        return archs;
    }
    let known = lines(Command::new(&nvcc.path).arg("--list-gpu-code"));
    for arch in present.iter().map(|capability| capability.replace('.', "")) {
        let is_new = !archs.iter().any(|built| built.trim_end_matches('a') == arch);
        if is_new && known.contains(&format!("sm_{arch}")) {
            archs.push(arch);
        }
    }
    archs
}

/// A variable that decides about the build: a change of it starts a new one.
fn var(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// `80,90a` as its parts.
fn archs(list: &str) -> Outcome<Vec<String>> {
    let archs: Vec<String> = list.split([',', ' ', ';']).map(str::trim).map(String::from).collect();
    let good = |arch: &String| {
        let number = arch.strip_suffix(['a', 'f']).unwrap_or(arch);
        (2..=3).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    match archs.iter().find(|arch| !good(arch)) {
        Some(bad) => Err(format!("invalid LAAM_CUDA_ARCHS={list}: {bad:?} must be like 80 or 90a")),
        None => Ok(archs),
    }
}

struct Nvcc {
    path: PathBuf,
    /// `13.0.88`
    version: String,
}

/// The first nvcc that works, or why there is none. An `NVCC` that does not work is an error.
fn find() -> Outcome<Result<Nvcc, String>> {
    if let Some(given) = var("NVCC") {
        let nvcc = ask(Path::new(&given));
        return nvcc.map(Ok).map_err(|why| format!("NVCC={given}: {why}"));
    }
    let mut places = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        places.extend(var(name).map(|home| Path::new(&home).join("bin/nvcc")));
    }
    let path = var("PATH").unwrap_or_default();
    places.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
    let own = PathBuf::from(".venv");
    for environment in var("VIRTUAL_ENV").map(PathBuf::from).into_iter().chain([own]) {
        let lib = environment.join("lib").read_dir().into_iter().flatten().flatten();
        let mut found: Vec<_> =
            lib.map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc")).collect();
        found.sort();
        places.extend(found);
    }
    places.extend(["/usr/local/cuda/bin/nvcc".into(), "/opt/cuda/bin/nvcc".into()]);

    let mut refused = Vec::new();
    for place in places.into_iter().filter(|place| place.is_file()) {
        match ask(&place) {
            Ok(nvcc) => return Ok(Ok(nvcc)),
            Err(why) => refused.push(format!("{} {why}", place.display())),
        }
    }
    let why = match refused.as_slice() {
        [] => "there is no nvcc".to_string(),
        some => format!("there is no nvcc that will do ({})", some.join("; ")),
    };
    Ok(Err(why))
}

/// Whether a compiler starts and is new enough.
fn ask(path: &Path) -> Outcome<Nvcc> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let output = Command::new(&path).arg("--version").output();
    let output = output.map_err(|e| format!("does not start: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    // Cuda compilation tools, release 13.0, V13.0.88
    let version = text.split_once(", V").map_or("", |(_, rest)| rest);
    let version = version.split_whitespace().next().unwrap_or_default().to_string();
    let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    match major {
        None => Err("does not say its version".into()),
        Some(major) if major < OLDEST => Err(format!("is {version}, too old: {OLDEST}.0 or newer")),
        Some(_) => {
            // cargo takes a file that is not there for one that changes all the time.
            if path.is_file() {
                println!("cargo::rerun-if-changed={}", path.display());
            }
            Ok(Nvcc { path, version })
        }
    }
}

/// The kernel files by name, sorted.
fn sources() -> Outcome<Vec<String>> {
    let folder = fs::read_dir("kernels").map_err(|e| format!("reading kernels/: {e}"))?;
    let mut names = Vec::new();
    for file in folder.flatten().map(|entry| entry.path()) {
        if file.extension() == Some(OsStr::new("cu")) {
            let name = file.file_stem().and_then(OsStr::to_str).unwrap_or_default();
            names.push(name.to_string());
        }
    }
    names.sort();
    Ok(names)
}

/// Compiles every `kernels/NAME.cu`.
fn compile(nvcc: &Nvcc, kernels: &[String], archs: &[String], out: &Path) -> Outcome<()> {
    let threads = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    let (next, errors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, kernels.len().max(1)) {
            scope.spawn(|| {
                while let Some(name) = kernels.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(why) = compile_file(nvcc, name, archs, out) {
                        errors.lock().expect("no thread panicked").push(why);
                    }
                }
            });
        }
    });
    let mut errors = errors.into_inner().expect("no thread panicked");
    errors.sort();
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

/// Writes `NAME.ptx` and, for a GPU, `NAME.fatbin`, unless they are newer than all they were made
/// from.
fn compile_file(nvcc: &Nvcc, name: &str, archs: &[String], out: &Path) -> Outcome<()> {
    let file = |suffix: &str| out.join(format!("{name}.{suffix}"));
    let io = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
    let new = file("new");
    let command = |arguments: &[&str], source: &Path| {
        let mut command = Command::new(&nvcc.path);
        command.args(["-O3", "-lineinfo"]).args(arguments).arg("-o").arg(&new).arg(source);
        command
    };
    let depend = file("d").display().to_string();
    let source = PathBuf::from(format!("kernels/{name}.cu"));
    let options = ["-ptx", "-arch=compute_80", "-std=c++17", "-MD", "-MF", &depend];
    let ptx = command(&options, &source);
    let fatbin = feature("CUDA").then(|| {
        // All SASS is assembled from the one PTX that the simulator runs: no kernel has instructions of one
        // architecture.
        let code = format!("-gencode=arch=compute_80,code=[sm_{},compute_80]", archs.join(",sm_"));
        command(&["-fatbin", &code, "-Xfatbin=-compress-all"], &file("ptx"))
    });
    let record = format!("{} {fatbin:?} {ptx:?}", nvcc.version);
    let outputs: &[&str] = if feature("CUDA") { &["ptx", "fatbin"] } else { &["ptx"] };
    let is_there = outputs.iter().all(|suffix| file(suffix).is_file());
    if is_there && is_current(&file("record"), &record, &file("d")) {
        return Ok(());
    }
    for suffix in outputs {
        let _ = fs::remove_file(file(suffix));
    }
    // Written before nvcc starts: a source that changes while it runs is newer than this.
    fs::write(file("record"), record).map_err(|e| io(&file("record"), e))?;
    run(ptx, name)?;
    let text = fs::read_to_string(&new).map_err(|e| io(&new, e))?;
    fs::write(file("ptx"), with_explicit_rounding(&text)).map_err(|e| io(&file("ptx"), e))?;
    if let Some(fatbin) = fatbin {
        run(fatbin, name)?;
        fs::rename(&new, file("fatbin")).map_err(|e| io(&new, e))?;
    }
    Ok(())
}

/// PTX whose sums and products are rounded one by one. Without `.rn` ptxas may fuse a product and a
/// sum, and the GPU would compute other bits than the simulator. What nvcc fused is `fma.rn` already:
/// this costs at most 1% of a kernel's instructions.
fn with_explicit_rounding(ptx: &str) -> String {
    let mut text = ptx.to_string();
    for operation in ["add", "sub", "mul"] {
        for dtype in ["f32", "ftz.f32", "f64"] {
            let rounded = format!("{operation}.rn.{dtype}\t");
            text = text.replace(&format!("{operation}.{dtype} \t"), &rounded);
            text = text.replace(&format!("{operation}.{dtype}\t"), &rounded);
        }
    }
    text
}

/// Runs nvcc on a kernel file; its warnings become cargo's.
fn run(mut nvcc: Command, name: &str) -> Outcome<()> {
    let output = nvcc.output().map_err(|e| format!("{}: {e}", nvcc.get_program().display()))?;
    let mut talk = String::from_utf8_lossy(&output.stdout).into_owned();
    talk.push_str(&String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(format!(
            "nvcc fails on kernels/{name}.cu ({}):\n{}",
            output.status,
            talk.trim()
        ));
    }
    for line in talk.lines().filter(|line| !line.trim().is_empty()) {
        println!("cargo::warning={line}");
    }
    Ok(())
}

/// Whether a feature of the package is on.
fn feature(name: &str) -> bool {
    env::var_os(format!("CARGO_FEATURE_{name}")).is_some()
}

/// Whether the outputs were made by this very command, and no file in `dependencies` changed since.
fn is_current(record_file: &Path, record: &str, dependencies: &Path) -> bool {
    let changed = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
    let (Some(begun), Ok(dependencies)) = (changed(record_file), fs::read_to_string(dependencies))
    else {
        return false;
    };
    // A make rule: `output : file file \`, spaces in a path written `\ `.
    let files = dependencies.split_once(" : ").map_or("", |(_, files)| files);
    let files = files.replace("\\\n", "\n").replace("\\ ", "\0");
    let mut files = files.split_whitespace().map(|file| file.replace('\0', " "));
    fs::read_to_string(record_file).is_ok_and(|written| written == record)
        && files.all(|file| changed(Path::new(&file)).is_some_and(|at| at < begun))
}

/// The Rust text that `src/kernels.rs` includes.
fn generated(kernels: &Kernels, archs: &[String]) -> String {
    let compiler = env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let rustc = Command::new(compiler).arg("--version").output();
    let rustc = rustc.map_or_else(|_| String::new(), |o| String::from_utf8_lossy(&o.stdout).into());
    let given = |name: &str| env::var(name).unwrap_or_default();
    let mut text = String::new();
    let cuda = match kernels {
        Kernels::Compiled(nvcc, _) => {
            let (path, version) = (nvcc.path.display().to_string(), &nvcc.version);
            format!("Ok(Nvcc {{ path: Some({path:?}), version: {version:?}, archs: &{archs:?} }})")
        }
        Kernels::Shipped(manifest) => {
            format!("Ok(Nvcc {{ path: None, version: {:?}, archs: &[] }})", manifest.nvcc)
        }
        Kernels::Left(why) => format!("Err({why:?})"),
    };
    writeln!(
        text,
        "/// How this program was built.\n\
         pub const BUILD: Build = Build {{ target: {:?}, profile: {:?}, rustc: {:?}, cuda: {cuda} }};",
        given("TARGET"),
        given("PROFILE"),
        rustc.trim()
    )
    .expect("a string takes all");
    let count = match kernels {
        Kernels::Compiled(_, names) => names.len(),
        Kernels::Shipped(manifest) => manifest.modules.len(),
        Kernels::Left(_) => 0,
    };
    text.push_str("/// Every kernel file, by name.\n");
    // A static: of a constant, each codegen unit that names it would have a copy.
    text.push_str("pub static CUDA_MODULES: &[CudaModule] = &MODULES;\n");
    writeln!(text, "static MODULES: [CudaModule; {count}] = [").expect("a string takes all");
    let mut line = |module: String| writeln!(text, "    CudaModule::{module},").expect("as above");
    match kernels {
        Kernels::Compiled(_, names) => {
            for name in names {
                let file = |kind| format!("(concat!(env!(\"OUT_DIR\"), \"/{name}.{kind}\"))");
                let fatbin = if feature("CUDA") {
                    format!("include_bytes!{}", file("fatbin"))
                } else {
                    "&[]".to_string()
                };
                line(format!("compiled({name:?}, {fatbin}, include_str!{})", file("ptx")));
            }
        }
        Kernels::Shipped(manifest) => {
            for ShippedModule { name, .. } in &manifest.modules {
                let file = format!("/kernels/prebuilt/{name}.ptx.xz");
                let file = format!("concat!(env!(\"CARGO_MANIFEST_DIR\"), {file:?})");
                line(format!("shipped({name:?}, include_bytes!({file}))"));
            }
        }
        Kernels::Left(_) => {}
    }
    text.push_str("];\n");
    text
}
