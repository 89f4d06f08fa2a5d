//! The command: its arguments, the listing, the run.

use std::fmt::Write;
use std::io::Read;

use half::{bf16, f16};
use ptx_race::{
    AccessProfile, AccessSpace, Arch, Arg, Check, Config, FaultKind, Kernel, Memory, Module,
    Options, Schedule,
};

/// The name it was built under: `ptxsim` is another name of this command.
pub const NAME: &str = env!("CARGO_BIN_NAME");

const USAGE: &str = "\
Usage: ptx-race FILE.ptx                       list the kernels of a file
       ptx-race FILE.ptx ENTRY [OPTIONS]       run one
       ptx-race race FILE.ptx ENTRY [OPTIONS]  run one and look for data races, as --race does

  --arg KIND            one for each parameter, in order:
                          u32=5, f32=0.5, s64=-1 ...    a value
                          f32[1024]=random              a buffer of random numbers in [-1, 1)
                          u32[64]=zero | iota | 7       a buffer of zeros, of 0 1 2 ..., of sevens
                          bf16[4096]=uninit             a buffer that must be written first
                          f32[1024]=@FILE, f32=@FILE    raw little-endian values from a file
                        types: u8 s8 u16 s16 u32 s32 u64 s64 f16 bf16 f32 f64
  --dump INDEX=FILE     write the buffer of argument INDEX (from 0) to a file after the run
  --grid X[,Y[,Z]]      blocks (1)
  --block X[,Y[,Z]]     threads per block (32)
  --shared BYTES        dynamic shared memory (0)
  --arch h100|a100      tensor-core arithmetic of this GPU (h100)
  --schedule S          in-order (default), reverse, or a seed for random priorities
  --race                look for data races too
  --profile             count bank conflicts and uncoalesced accesses per instruction
  --threads N           host threads (1)
  --max-instructions N  warp instructions the launch may execute (268435456)
";

/// What went wrong, and what to do.
pub struct CommandError {
    pub what: String,
    pub hint: String,
}

fn failure<T>(what: impl Into<String>, hint: impl Into<String>) -> Result<T, CommandError> {
    Err(CommandError { what: what.into(), hint: hint.into() })
}

/// Bytes that the buffers of all arguments may take together.
const MAX_BUFFER_BYTES: usize = 1 << 30;
/// Bytes of the largest PTX file that is read.
const MAX_PTX_BYTES: u64 = 1 << 28;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ElementType {
    Int { bytes: usize, signed: bool },
    F16,
    Bf16,
    F32,
    F64,
}

impl ElementType {
    fn of(name: &str) -> Option<ElementType> {
        let int = |bytes, signed| Some(ElementType::Int { bytes, signed });
        match name {
            "u8" => int(1, false),
            "s8" => int(1, true),
            "u16" => int(2, false),
            "s16" => int(2, true),
            "u32" => int(4, false),
            "s32" => int(4, true),
            "u64" => int(8, false),
            "s64" => int(8, true),
            "f16" => Some(ElementType::F16),
            "bf16" => Some(ElementType::Bf16),
            "f32" => Some(ElementType::F32),
            "f64" => Some(ElementType::F64),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        match self {
            ElementType::Int { bytes, .. } => bytes,
            ElementType::F16 | ElementType::Bf16 => 2,
            ElementType::F32 => 4,
            ElementType::F64 => 8,
        }
    }

    /// A number in this type, integers wrapping.
    fn encode(self, value: f64, integer: i128) -> Vec<u8> {
        match self {
            ElementType::Int { bytes, .. } => integer.to_le_bytes()[..bytes].to_vec(),
            ElementType::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
            ElementType::Bf16 => bf16::from_f64(value).to_le_bytes().to_vec(),
            ElementType::F32 => (value as f32).to_le_bytes().to_vec(),
            ElementType::F64 => value.to_le_bytes().to_vec(),
        }
    }

    fn parse(self, text: &str) -> Option<Vec<u8>> {
        if let ElementType::Int { bytes, signed } = self {
            let value: i128 = text.parse().ok()?;
            let bits = 8 * bytes as u32;
            let (low, high) =
                if signed { (-(1 << (bits - 1)), 1 << (bits - 1)) } else { (0, 1 << bits) };
            return (low..high).contains(&value).then(|| self.encode(0.0, value));
        }
        text.parse().ok().map(|value| self.encode(value, 0))
    }

    fn decode(self, bytes: &[u8]) -> String {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(word);
        match self {
            ElementType::Int { bytes, signed: true } => {
                let shift = 64 - 8 * bytes as u32;
                ((bits << shift) as i64 >> shift).to_string()
            }
            ElementType::Int { .. } => bits.to_string(),
            ElementType::F16 => shown(f16::from_bits(bits as u16)),
            ElementType::Bf16 => shown(bf16::from_bits(bits as u16)),
            ElementType::F32 => shown(f32::from_bits(bits as u32)),
            ElementType::F64 => shown(f64::from_bits(bits)),
        }
    }
}

/// A number with an exponent if it would be long without.
fn shown<T: std::fmt::Display + std::fmt::LowerExp + Copy + Into<f64>>(number: T) -> String {
    let magnitude = number.into().abs();
    let is_short = magnitude == 0.0 || (1e-4..1e7).contains(&magnitude) || !magnitude.is_finite();
    if is_short { number.to_string() } else { format!("{number:e}") }
}

/// An `--arg`.
struct CommandArg {
    text: String,
    ty: ElementType,
    /// Elements of a buffer; None for a value.
    count: Option<usize>,
    value: String,
}

impl CommandArg {
    fn parse(text: &str) -> Result<CommandArg, CommandError> {
        let hint = "an argument is like u32=5, f32[1024]=random or f32[1024]=@FILE";
        let bad = || failure(format!("invalid `--arg {text}`"), hint);
        let Some((kind, value)) = text.split_once('=') else { return bad() };
        let (name, count) = match kind.split_once('[') {
            None => (kind, None),
            Some((name, count)) => {
                let count = count.strip_suffix(']').and_then(|count| count.parse::<usize>().ok());
                let Some(count) = count else { return bad() };
                (name, Some(count))
            }
        };
        let Some(ty) = ElementType::of(name) else { return bad() };
        let known = count.is_some() && matches!(value, "random" | "zero" | "iota" | "uninit");
        if !known && !value.starts_with('@') && ty.parse(value).is_none() {
            return failure(format!("`{value}` in `--arg {text}` is not a valid {name}"), hint);
        }
        Ok(CommandArg { text: text.to_owned(), ty, count, value: value.to_owned() })
    }

    /// Bytes of the buffer or the value.
    fn bytes(&self) -> usize {
        self.count.unwrap_or(1).saturating_mul(self.ty.bytes())
    }

    /// The argument, and the address of its buffer.
    fn make(&self, memory: &Memory, seed: u64) -> Result<(Arg, Option<u64>), CommandError> {
        if let Some(path) = self.value.strip_prefix('@') {
            let bytes = self.read(path)?;
            if self.count.is_none() {
                return Ok((Arg::bytes(&bytes), None));
            }
            let address = memory.alloc(&bytes);
            return Ok((Arg::from(address), Some(address)));
        }
        let Some(count) = self.count else {
            return Ok((Arg::bytes(&self.ty.parse(&self.value).unwrap_or_default()), None));
        };
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut random = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let x = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            x ^ x >> 31
        };
        let address = match self.value.as_str() {
            "uninit" => memory.alloc_uninit(self.bytes()),
            "zero" => memory.alloc_zeroed(self.bytes()),
            "random" => {
                let element = |_| {
                    let bits = random();
                    let unit = (bits >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
                    self.ty.encode(unit, bits.into())
                };
                memory.alloc(&(0..count).flat_map(element).collect::<Vec<u8>>())
            }
            "iota" => {
                let element = |i: usize| self.ty.encode(i as f64, i as i128);
                memory.alloc(&(0..count).flat_map(element).collect::<Vec<u8>>())
            }
            value => memory.alloc(&self.ty.parse(value).unwrap_or_default().repeat(count)),
        };
        Ok((Arg::from(address), Some(address)))
    }

    /// The raw contents of a file, which must be as long as the argument.
    fn read(&self, path: &str) -> Result<Vec<u8>, CommandError> {
        let wanted = self.bytes();
        let hint = format!("`{}` takes {wanted} bytes: raw little-endian values", self.text);
        let bytes = match read_file(path, wanted as u64 + 1) {
            Ok(bytes) => bytes,
            Err(error) => return failure(format!("cannot read {path}: {error}"), hint),
        };
        if bytes.len() != wanted {
            let more = if bytes.len() > wanted { "more than " } else { "" };
            let held = bytes.len().min(wanted);
            return failure(format!("{path} holds {more}{held} bytes"), hint);
        }
        Ok(bytes)
    }
}

/// The first bytes of a regular file.
fn read_file(path: &str, limit: u64) -> std::io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

struct CommandLine {
    file: String,
    entry: Option<String>,
    config: Config,
    options: Options,
    args: Vec<CommandArg>,
    /// Arguments to write after the run, and the files they go to.
    dumps: Vec<(usize, String)>,
}

fn shape(flag: &str, text: &str) -> Result<[u32; 3], CommandError> {
    let mut shape = [1; 3];
    let parts: Vec<_> = text.split(',').collect();
    for (size, part) in shape.iter_mut().zip(&parts) {
        let Ok(value) = part.parse() else {
            return failure(format!("invalid `{flag} {text}`"), format!("as in {flag} 8,4"));
        };
        *size = value;
    }
    if parts.len() > 3 {
        return failure(format!("`{flag} {text}` has {} dimensions", parts.len()), "at most three");
    }
    Ok(shape)
}

fn number<T: std::str::FromStr>(flag: &str, text: &str) -> Result<T, CommandError> {
    match text.parse() {
        Ok(value) => Ok(value),
        Err(_) => failure(
            format!("invalid `{flag} {text}`: must be a whole number in range"),
            format!("see {NAME} --help"),
        ),
    }
}

fn dump(text: &str) -> Result<(usize, String), CommandError> {
    let parts = text.split_once('=').filter(|(_, file)| !file.is_empty());
    match parts.and_then(|(index, file)| Some((index.parse().ok()?, file.to_owned()))) {
        Some(dump) => Ok(dump),
        None => failure(format!("invalid `--dump {text}`"), "as in --dump 0=out.bin"),
    }
}

fn schedule(flag: &str, text: &str) -> Result<Schedule, CommandError> {
    Ok(match text {
        "in-order" | "in_order" | "greedy" => Schedule::InOrder,
        "reverse" => Schedule::ReverseOrder,
        seed => {
            let Ok(seed) = seed.parse() else {
                let hint = "a schedule is in-order, reverse, or a seed such as 7";
                return failure(format!("invalid `{flag} {text}`"), hint);
            };
            Schedule::Random(seed)
        }
    })
}

fn arch(flag: &str, text: &str) -> Result<Arch, CommandError> {
    match text {
        "h100" => Ok(Arch::H100),
        "a100" => Ok(Arch::A100),
        _ => failure(format!("invalid `{flag} {text}`"), "the architectures are h100 and a100"),
    }
}

fn parse(arguments: &[String]) -> Result<CommandLine, CommandError> {
    let mut names = Vec::new();
    let mut line = CommandLine {
        file: String::new(),
        entry: None,
        config: Config::linear(1, 32),
        options: Options::default(),
        args: Vec::new(),
        dumps: Vec::new(),
    };
    let options = &mut line.options;
    let mut list = arguments.iter();
    while let Some(argument) = list.next() {
        if !argument.starts_with("--") {
            names.push(argument.clone());
            continue;
        }
        let (flag, inline) = match argument.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (argument.as_str(), None),
        };
        let flag = flag.replace('_', "-");
        let flag = flag.as_str();
        if matches!(flag, "--race" | "--profile") && inline.is_some() {
            return failure(format!("`{flag}` takes no value"), format!("see {NAME} --help"));
        }
        let mut value = || match inline.or_else(|| list.next().map(String::as_str)) {
            Some(value) => Ok(value),
            None => failure(format!("`{flag}` needs a value"), format!("see {NAME} --help")),
        };
        match flag {
            "--race" => options.check = Check::Races,
            "--profile" => options.profile = true,
            "--arg" => line.args.push(CommandArg::parse(value()?)?),
            "--dump" => line.dumps.push(dump(value()?)?),
            "--grid" => line.config.grid = shape(flag, value()?)?,
            "--block" => line.config.block = shape(flag, value()?)?,
            "--shared" => line.config.shared = number(flag, value()?)?,
            "--threads" => {
                options.threads = number::<std::num::NonZero<usize>>(flag, value()?)?.get();
            }
            "--max-instructions" | "--budget" => options.max_instructions = number(flag, value()?)?,
            "--arch" => options.arch = arch(flag, value()?)?,
            "--schedule" => options.schedule = schedule(flag, value()?)?,
            _ => {
                return failure(
                    format!("unknown option `{argument}`"),
                    format!("see {NAME} --help"),
                );
            }
        }
    }
    let is_race = names.first().is_some_and(|name| name == "race");
    if is_race && (names.len() > 1 || !std::path::Path::new("race").exists()) {
        names.remove(0);
        options.check = Check::Races;
    }
    let mut names = names.into_iter();
    let Some(file) = names.next() else {
        return failure(
            "no file given",
            format!("{NAME} FILE.ptx lists its kernels; see {NAME} --help"),
        );
    };
    line.file = file;
    line.entry = names.next();
    if let Some(extra) = names.next() {
        return failure(
            format!("unexpected `{extra}`"),
            format!("{NAME} FILE.ptx [ENTRY] [OPTIONS]"),
        );
    }
    for &(index, ref file) in &line.dumps {
        let what = match line.args.get(index) {
            None => format!("there are {} arguments, numbered from 0", line.args.len()),
            Some(arg) if arg.count.is_none() => format!("argument {index} is a value"),
            Some(_) => continue,
        };
        let hint = "INDEX is that of a buffer, such as --arg f32[1024]=zero";
        return failure(format!("invalid `--dump {index}={file}`: {what}"), hint);
    }
    let bytes = line.args.iter().fold(0, |bytes: usize, arg| bytes.saturating_add(arg.bytes()));
    if bytes > MAX_BUFFER_BYTES {
        let hint = "run a smaller shape";
        return failure(format!("the arguments take more than {MAX_BUFFER_BYTES} bytes"), hint);
    }
    Ok(line)
}

pub fn run(arguments: &[String], out: &mut String) -> Result<(), CommandError> {
    if arguments.is_empty() || arguments.iter().any(|a| a == "--help" || a == "-h") {
        out.push_str(&USAGE.replace("ptx-race", NAME));
        return Ok(());
    }
    if arguments.iter().any(|a| a == "--version" || a == "-V") {
        let _ = writeln!(out, "{NAME} {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    let line = parse(arguments)?;
    let file = &line.file;
    let read = read_file(file, MAX_PTX_BYTES).and_then(|bytes| {
        String::from_utf8(bytes).map_err(|_| std::io::Error::other("not UTF-8 text"))
    });
    let text = match read {
        Ok(text) => text,
        Err(error) => {
            let hint = "nvcc -ptx -lineinfo -arch=compute_80 kernel.cu writes a PTX file";
            return failure(format!("cannot read {file}: {error}"), hint);
        }
    };
    let module = match Module::from_ptx(&text) {
        Ok(module) => module,
        Err(error) => {
            let hint = "the README says what is modeled; compile for compute_80";
            return failure(format!("{file}: {error}"), hint);
        }
    };
    if module.target().is_empty() {
        let hint = "nvcc -ptx -lineinfo -arch=compute_80 kernel.cu writes a PTX file";
        return failure(format!("{file} is not PTX: it has no .target"), hint);
    }
    let Some(entry) = &line.entry else {
        list(&module, out);
        return Ok(());
    };
    let Some(kernel) = module.kernel(entry) else {
        let names: Vec<_> = module.kernels().map(|kernel| kernel.name().to_owned()).collect();
        let hint = match &names[..] {
            [] => "it has no kernels".to_owned(),
            names => format!("it has: {}", names.join(", ")),
        };
        return failure(format!("{file} has no kernel `{entry}`"), hint);
    };
    launch(&kernel, &line, out)
}

fn list(module: &Module, out: &mut String) {
    let _ = writeln!(out, "target {}", module.target());
    for kernel in module.kernels() {
        let _ = writeln!(out, "\n{}", kernel.name());
        for param in kernel.params() {
            let _ = writeln!(
                out,
                "  parameter  .{:<4} {:>4} bytes, aligned to {:<2}  {}",
                param.ty, param.size, param.align, param.name
            );
        }
        let _ = writeln!(
            out,
            "  registers  {} declared (virtual: a GPU's count is in the SASS)",
            kernel.registers()
        );
        let _ = writeln!(out, "  shared     {} bytes static", kernel.static_shared());
        let _ = writeln!(out, "  local      {} bytes per thread", kernel.local_bytes());
        let mut mix: Vec<_> = kernel.instruction_mix().into_iter().collect();
        mix.sort_by_key(|&(name, count)| (std::cmp::Reverse(count), name));
        let total: u64 = mix.iter().map(|(_, count)| count).sum();
        let _ = writeln!(out, "  code       {total} instructions");
        for (name, count) in mix {
            let _ = writeln!(out, "    {count:>6}  {name}");
        }
    }
}

fn launch(kernel: &Kernel, line: &CommandLine, out: &mut String) -> Result<(), CommandError> {
    let memory = Memory::new();
    let mut args = Vec::new();
    let mut buffers = Vec::new();
    for (arg, seed) in line.args.iter().zip(1..) {
        let (value, address) = arg.make(&memory, seed)?;
        args.push(value);
        buffers.push((arg, address));
    }
    let start = std::time::Instant::now();
    let stats = match kernel.launch(&memory, &line.config, &args, &line.options) {
        Ok(stats) => stats,
        Err(fault) => {
            return failure(fault.to_string(), hint(kernel, fault.kind));
        }
    };
    let seconds = start.elapsed().as_secs_f64();
    let _ = writeln!(
        out,
        "{} warp instructions ({} thread instructions) in {:.1} ms, {:.1} M/s",
        stats.warp_instructions,
        stats.thread_instructions,
        seconds * 1e3,
        stats.warp_instructions as f64 / seconds / 1e6
    );
    let mut mix: Vec<_> = stats.by_opcode.iter().collect();
    mix.sort_by_key(|&(name, count)| (std::cmp::Reverse(count), name));
    for (name, count) in mix {
        let _ = writeln!(out, "  {count:>12}  {name}");
    }
    if line.options.profile {
        profile(&stats.profile, out);
    }
    for (index, (arg, address)) in buffers.iter().enumerate() {
        let Some(address) = *address else { continue };
        let size = arg.ty.bytes();
        let bytes = memory.read_vec(address, arg.bytes());
        for (_, path) in line.dumps.iter().filter(|(dumped, _)| *dumped == index) {
            let bytes = match &bytes {
                Ok(bytes) => bytes,
                Err(error) => {
                    let hint = "the kernel must write all of a buffer made with =uninit";
                    return failure(format!("cannot dump argument {index}: {error}"), hint);
                }
            };
            if let Err(error) = std::fs::write(path, bytes) {
                let hint = "--dump INDEX=FILE takes a file in a folder that can be written to";
                return failure(format!("cannot write {path}: {error}"), hint);
            }
        }
        let told = match &bytes {
            Ok(bytes) => {
                let digest = bytes.iter().fold(0xCBF2_9CE4_8422_2325u64, |hash, &byte| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
                });
                let shown = bytes.chunks_exact(size).take(4).map(|value| arg.ty.decode(value));
                let shown = shown.collect::<Vec<_>>().join(" ");
                let more = if bytes.len() > 4 * size { " ..." } else { "" };
                format!("digest {digest:016x}  {shown}{more}")
            }
            Err(error) => error.to_string(),
        };
        let _ = writeln!(out, "argument {index}  {}  {told}", arg.text);
    }
    Ok(())
}

/// The table of `--profile`: what costs most beyond the ideal first.
fn profile(profile: &[AccessProfile], out: &mut String) {
    let mut rows: Vec<_> = profile.iter().collect();
    rows.sort_by_key(|row| (std::cmp::Reverse(row.transactions - row.ideal), row.ptx_line));
    let _ = writeln!(
        out,
        "\nmemory    requests         bytes  transactions         ideal  per request  instruction"
    );
    for row in rows {
        let space = match row.space {
            AccessSpace::Global => "global",
            AccessSpace::Shared => "shared",
        };
        let source = row.source.as_ref().map_or(String::new(), |source| format!("  {source}"));
        let _ = writeln!(
            out,
            "{space}  {:>10}  {:>12}  {:>12}  {:>12}  {:>11.2}  `{}`, PTX line {}{source}",
            row.requests,
            row.bytes,
            row.transactions,
            row.ideal,
            row.transactions as f64 / row.requests as f64,
            row.opcode,
            row.ptx_line,
        );
    }
    let _ = writeln!(
        out,
        "transactions: 32-byte sectors of global memory, passes through the banks of shared \
         memory\n"
    );
}

fn hint(kernel: &Kernel, kind: FaultKind) -> String {
    match kind {
        FaultKind::Arguments => {
            let params: Vec<_> = kernel
                .params()
                .iter()
                .map(|param| format!(".{} ({} bytes)", param.ty, param.size))
                .collect();
            format!("give one --arg for each of: {}; a buffer fills a .u64", params.join(", "))
        }
        FaultKind::Race => {
            "a barrier, __syncwarp, or a release (fence, then a strong write of a flag) and an \
             acquire (strong read of it, then fence), each of a scope that includes both threads, \
             order accesses"
                .into()
        }
        FaultKind::AsyncInFlight => {
            "commit the copies, wait for their group, then pass a barrier before others read".into()
        }
        FaultKind::Uninitialized => {
            "shared memory and buffers made with =uninit must be written before they are read"
                .into()
        }
        FaultKind::Budget => "raise it with --max-instructions if the kernel is only long".into(),
        FaultKind::Capacity => "run a smaller shape".into(),
        FaultKind::MissingLanes => {
            "all lanes that the mask names must come to the same instruction".into()
        }
        FaultKind::OutOfBounds | FaultKind::UseAfterFree => {
            "make the buffer larger, or guard the access by the number of elements".into()
        }
        FaultKind::Misaligned => "an address must be a multiple of the bytes accessed".into(),
        FaultKind::Deadlock => "every thread of the block must come to the same barriers".into(),
        FaultKind::Launch => {
            "--grid, --block and --shared must be within what a GPU and the kernel allow".into()
        }
        FaultKind::Trap => "the kernel ended itself: see the condition before it".into(),
        FaultKind::StackOverflow => "calls nest too deeply: bound the recursion".into(),
        FaultKind::InvalidOperand => {
            "the PTX ISA leaves this operand undefined: see the instruction there".into()
        }
    }
}
