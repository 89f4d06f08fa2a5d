//! The command: arguments, the listing, the run.

use std::fmt::Write;

use half::{bf16, f16};
use ptxsim::{Arg, Check, Config, FaultKind, Kernel, Memory, Module, Options, Schedule};

const USAGE: &str = "\
Usage: ptxsim FILE.ptx                 list the kernels of a file
       ptxsim FILE.ptx ENTRY [OPTIONS] run one on generated buffers

  --arg KIND          one for each parameter, in order:
                        u32=5, f32=0.5, s64=-1 ...    a value
                        f32[1024]=random              a buffer of random numbers in [-1, 1)
                        u32[64]=zero | iota | 7       a buffer of zeros, of 0 1 2 ..., of sevens
                        bf16[4096]=uninit             a buffer that must be written first
                      types: u8 s8 u16 s16 u32 s32 u64 s64 f16 bf16 f32 f64
  --grid X[,Y[,Z]]    blocks (1)
  --block X[,Y[,Z]]   threads of a block (32)
  --shared BYTES      dynamic shared memory (0)
  --schedule S        greedy (default), reverse, or a seed for random priorities
  --race              look for data races too
  --threads N         threads of this machine (1)
  --budget N          warp instructions a block may execute
";

/// What went wrong, and perhaps what to do.
pub struct Failure {
    pub what: String,
    pub hint: Option<String>,
}

fn failure<T>(what: impl Into<String>, hint: impl Into<String>) -> Result<T, Failure> {
    Err(Failure { what: what.into(), hint: Some(hint.into()) })
}

/// Largest buffer an argument may ask for.
const MAX_BUFFER: usize = 1 << 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Int { bytes: usize, signed: bool },
    F16,
    Bf16,
    F32,
    F64,
}

impl Type {
    fn of(name: &str) -> Option<Type> {
        let int = |bytes, signed| Some(Type::Int { bytes, signed });
        match name {
            "u8" => int(1, false),
            "s8" => int(1, true),
            "u16" => int(2, false),
            "s16" => int(2, true),
            "u32" => int(4, false),
            "s32" => int(4, true),
            "u64" => int(8, false),
            "s64" => int(8, true),
            "f16" => Some(Type::F16),
            "bf16" => Some(Type::Bf16),
            "f32" => Some(Type::F32),
            "f64" => Some(Type::F64),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Type::Int { bytes, .. } => bytes,
            Type::F16 | Type::Bf16 => 2,
            Type::F32 => 4,
            Type::F64 => 8,
        }
    }

    /// A number in this type, integers wrapping.
    fn encode(self, value: f64, integer: i128) -> Vec<u8> {
        match self {
            Type::Int { bytes, .. } => integer.to_le_bytes()[..bytes].to_vec(),
            Type::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
            Type::Bf16 => bf16::from_f64(value).to_le_bytes().to_vec(),
            Type::F32 => (value as f32).to_le_bytes().to_vec(),
            Type::F64 => value.to_le_bytes().to_vec(),
        }
    }

    fn parse(self, text: &str) -> Option<Vec<u8>> {
        if let Type::Int { bytes, signed } = self {
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
            Type::Int { bytes, signed: true } => {
                let shift = 64 - 8 * bytes as u32;
                ((bits << shift) as i64 >> shift).to_string()
            }
            Type::Int { .. } => bits.to_string(),
            Type::F16 => f16::from_bits(bits as u16).to_string(),
            Type::Bf16 => bf16::from_bits(bits as u16).to_string(),
            Type::F32 => f32::from_bits(bits as u32).to_string(),
            Type::F64 => f64::from_bits(bits).to_string(),
        }
    }
}

/// A generated argument.
struct Given {
    text: String,
    ty: Type,
    /// Elements of a buffer; None for a value.
    count: Option<usize>,
    value: String,
}

impl Given {
    fn parse(text: &str) -> Result<Given, Failure> {
        let hint = "an argument is like u32=5 or f32[1024]=random";
        let bad = || failure(format!("`--arg {text}` makes no sense"), hint);
        let Some((kind, value)) = text.split_once('=') else { return bad() };
        let (name, count) = match kind.split_once('[') {
            None => (kind, None),
            Some((name, count)) => {
                let count = count.strip_suffix(']').and_then(|count| count.parse::<usize>().ok());
                let Some(count) = count else { return bad() };
                (name, Some(count))
            }
        };
        let Some(ty) = Type::of(name) else { return bad() };
        if count.is_some_and(|count| count > MAX_BUFFER / ty.bytes()) {
            return failure(format!("`--arg {text}` asks for more than {MAX_BUFFER} bytes"), hint);
        }
        let known = count.is_some() && matches!(value, "random" | "zero" | "iota" | "uninit");
        if !known && ty.parse(value).is_none() {
            return failure(format!("`{value}` in `--arg {text}` is no {name}"), hint);
        }
        Ok(Given { text: text.to_owned(), ty, count, value: value.to_owned() })
    }

    /// The argument, and the address of its buffer.
    fn make(&self, memory: &Memory, seed: u64) -> (Arg, Option<u64>) {
        let Some(count) = self.count else {
            return (Arg::bytes(&self.ty.parse(&self.value).unwrap_or_default()), None);
        };
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut random = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let x = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            x ^ x >> 31
        };
        let address = match self.value.as_str() {
            "uninit" => memory.alloc_uninit(count * self.ty.bytes()),
            "zero" => memory.alloc_zeroed(count * self.ty.bytes()),
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
        (Arg::from(address), Some(address))
    }
}

struct Arguments {
    file: String,
    entry: Option<String>,
    config: Config,
    options: Options,
    given: Vec<Given>,
}

fn shape(flag: &str, text: &str) -> Result<[u32; 3], Failure> {
    let mut shape = [1; 3];
    let parts: Vec<_> = text.split(',').collect();
    for (size, part) in shape.iter_mut().zip(&parts) {
        let Ok(value) = part.parse() else {
            return failure(format!("`{flag} {text}` is no shape"), format!("as in {flag} 8,4"));
        };
        *size = value;
    }
    if parts.len() > 3 {
        return failure(format!("`{flag} {text}` has {} dimensions", parts.len()), "at most three");
    }
    Ok(shape)
}

fn number<T: std::str::FromStr>(flag: &str, text: &str) -> Result<T, Failure> {
    match text.parse() {
        Ok(value) => Ok(value),
        Err(_) => failure(format!("`{flag} {text}` is no number in range"), "see ptxsim --help"),
    }
}

fn parse(arguments: &[String]) -> Result<Arguments, Failure> {
    let mut names = Vec::new();
    let mut config = Config::linear(1, 32);
    let mut options = Options::default();
    let mut given = Vec::new();
    let mut list = arguments.iter();
    while let Some(argument) = list.next() {
        if !argument.starts_with("--") {
            names.push(argument.clone());
            continue;
        }
        if argument == "--race" {
            options.check = Check::Races;
            continue;
        }
        let known =
            ["--arg", "--grid", "--block", "--shared", "--schedule", "--threads", "--budget"];
        let flag = argument.as_str();
        if !known.contains(&flag) {
            return failure(format!("unknown option `{flag}`"), "see ptxsim --help");
        }
        let Some(value) = list.next() else {
            return failure(format!("`{flag}` needs a value"), "see ptxsim --help");
        };
        match flag {
            "--arg" => given.push(Given::parse(value)?),
            "--grid" => config.grid = shape(flag, value)?,
            "--block" => config.block = shape(flag, value)?,
            "--shared" => config.shared = number(flag, value)?,
            "--threads" => options.threads = number(flag, value)?,
            "--budget" => options.max_instructions = number(flag, value)?,
            _ => {
                options.schedule = match value.as_str() {
                    "greedy" => Schedule::InOrder,
                    "reverse" => Schedule::ReverseOrder,
                    seed => Schedule::Random(number(flag, seed)?),
                };
            }
        }
    }
    let mut names = names.into_iter();
    let Some(file) = names.next() else {
        return failure("no file given", "ptxsim FILE.ptx lists its kernels; see ptxsim --help");
    };
    let entry = names.next();
    if let Some(extra) = names.next() {
        return failure(format!("what is `{extra}`?"), "ptxsim FILE.ptx [ENTRY] [OPTIONS]");
    }
    Ok(Arguments { file, entry, config, options, given })
}

pub fn run(arguments: &[String], out: &mut String) -> Result<(), Failure> {
    if arguments.is_empty() || arguments.iter().any(|a| a == "--help" || a == "-h") {
        out.push_str(USAGE);
        return Ok(());
    }
    let arguments = parse(arguments)?;
    let file = &arguments.file;
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => {
            let hint = "nvcc -ptx -lineinfo -arch=compute_80 kernel.cu writes a PTX file";
            return failure(format!("cannot read {file}: {error}"), hint);
        }
    };
    let module = match Module::from_ptx(&text) {
        Ok(module) => module,
        Err(error) => {
            let hint = "the README says what is modelled; compile for compute_80";
            return failure(format!("{file}: {error}"), hint);
        }
    };
    let Some(entry) = &arguments.entry else {
        list(&module, out);
        return Ok(());
    };
    let Some(kernel) = module.kernel(entry) else {
        let names: Vec<_> = module.kernels().map(|kernel| kernel.name().to_owned()).collect();
        return failure(
            format!("{file} has no kernel `{entry}`"),
            format!("it has: {}", names.join(", ")),
        );
    };
    launch(&kernel, &arguments, out)
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

fn launch(kernel: &Kernel, arguments: &Arguments, out: &mut String) -> Result<(), Failure> {
    let memory = Memory::new();
    let made: Vec<_> = arguments
        .given
        .iter()
        .zip(1..)
        .map(|(given, seed)| (given, given.make(&memory, seed)))
        .collect();
    let args: Vec<Arg> = made.iter().map(|(_, (arg, _))| arg.clone()).collect();
    let start = std::time::Instant::now();
    let stats = match kernel.launch(&memory, &arguments.config, &args, &arguments.options) {
        Ok(stats) => stats,
        Err(fault) => {
            return Err(Failure { what: fault.to_string(), hint: hint(kernel, fault.kind) });
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
    for (index, (given, (_, address))) in made.iter().enumerate() {
        let (Some(address), Some(count)) = (*address, given.count) else { continue };
        let size = given.ty.bytes();
        match memory.read_vec(address, count * size) {
            Ok(bytes) => {
                let digest = bytes.iter().fold(0xCBF2_9CE4_8422_2325u64, |hash, &byte| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
                });
                let shown: Vec<_> =
                    bytes.chunks_exact(size).take(4).map(|value| given.ty.decode(value)).collect();
                let more = if count > 4 { " ..." } else { "" };
                let _ = writeln!(
                    out,
                    "argument {index}  {}  digest {digest:016x}  {}{more}",
                    given.text,
                    shown.join(" ")
                );
            }
            Err(error) => {
                let _ = writeln!(out, "argument {index}  {}  {error}", given.text);
            }
        }
    }
    Ok(())
}

fn hint(kernel: &Kernel, kind: FaultKind) -> Option<String> {
    Some(match kind {
        FaultKind::Arguments => {
            let params: Vec<_> = kernel
                .params()
                .iter()
                .map(|param| format!(".{} ({} bytes)", param.ty, param.size))
                .collect();
            format!("give one --arg for each of: {}; a buffer fills a .u64", params.join(", "))
        }
        FaultKind::Race => "a barrier, __syncwarp, or atomics between fences order accesses".into(),
        FaultKind::AsyncInFlight => {
            "commit the copies, wait for their group, then pass a barrier before others read".into()
        }
        FaultKind::Uninitialized => {
            "shared memory and buffers made with =uninit must be written before they are read"
                .into()
        }
        FaultKind::Budget => "raise it with --budget if the kernel is only long".into(),
        FaultKind::MissingLanes => {
            "all lanes that the mask names must come to the same instruction".into()
        }
        _ => return None,
    })
}
