//! Forwarding of a call, and its line in the trace.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::env;
use std::ffi::{CStr, CString, c_char, c_void};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

/// What an argument is. A number is the position of another argument of the call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Byte,
    Int,
    Size,
    Handle,
    Address,
    /// Zero-terminated.
    Text,
    /// PTX text or machine code.
    Image,
    /// Host memory that is read; the argument with its length.
    Bytes(usize),
    /// Host memory that may be read, of unknown length.
    Opaque,
    /// `f32` that is read.
    Scalar,
    /// Pointers to the arguments of a kernel; the argument with its function.
    Parameters(usize),
    Algorithm,
    OutInt,
    OutSize,
    OutTime,
    /// 16 bytes, which are not recorded.
    OutUuid,
    OutHandle,
    /// The argument with its size.
    OutAddress(usize),
    /// Static text.
    OutText,
    /// A text copied to a buffer; the argument with its length.
    OutName(usize),
    /// The argument with its length.
    OutBytes(usize),
    OutResult,
    /// The argument with their number.
    OutResults(usize),
}

/// Longest host memory and PTX text whose contents are recorded, in bytes.
const MAX_BYTES: usize = 64;
const MAX_PTX_BYTES: usize = 4096;
/// Handles below are constants, such as `CU_STREAM_LEGACY`.
const FIRST_HANDLE: usize = 16;

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy)]
struct HeuristicResult {
    algorithm: [u64; 8],
    workspace: usize,
    state: u32,
    waves: f32,
    reserved: [i32; 4],
}

/// The trace being written, with the numbers given out.
struct Trace {
    file: File,
    lines_left: u64,
    handles: HashMap<usize, usize>,
    /// Size and number by address.
    allocations: BTreeMap<u64, (u64, usize)>,
    allocated: usize,
    algorithms: HashMap<[u64; 8], usize>,
    threads: HashMap<ThreadId, usize>,
}

/// Any of the recorded functions; those with fewer arguments ignore the rest.
type Function = extern "C" fn(
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
) -> usize;

thread_local! {
    /// A recorded call is being made on this thread.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// `CUDA_ERROR_NOT_FOUND`, for a function that the real library lacks.
const NOT_FOUND: usize = 500;

static TRACE: OnceLock<Option<Mutex<Trace>>> = OnceLock::new();

/// Makes a call, and records it.
pub(crate) fn call(symbol: &'static str, kinds: &[Kind], args: &[usize]) -> usize {
    let Some(function) = real(symbol) else { return NOT_FOUND };
    let mut all = [0; 16];
    for (to, (kind, arg)) in all.iter_mut().zip(kinds.iter().zip(args)) {
        // The upper bits of a narrow argument are not defined.
        *to = match kind {
            Kind::Byte => *arg & 0xFF,
            Kind::Int => *arg & 0xFFFF_FFFF,
            _ => *arg,
        };
    }
    let args = &all[..kinds.len()];
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = all;
    let make = || function(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) & 0xFFFF_FFFF;
    let trace = TRACE.get_or_init(|| Trace::open().map(Mutex::new));
    let Some(trace) = trace.as_ref().filter(|_| !INSIDE.get()) else { return make() };
    INSIDE.set(true);
    let code = {
        let mut trace = trace.lock().unwrap_or_else(PoisonError::into_inner);
        trace.record(symbol, kinds, args, make)
    };
    INSIDE.set(false);
    code
}

/// A function of the real library.
fn real(symbol: &str) -> Option<Function> {
    static DRIVER: OnceLock<Option<usize>> = OnceLock::new();
    static CUBLASLT: OnceLock<Option<usize>> = OnceLock::new();
    let open = |variable| {
        let path = env::var(variable).unwrap_or_default();
        let name = CString::new(path.as_str()).ok()?;
        // SAFETY: the person who records names the library, whose initializers are safe to run.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() || path.is_empty() {
            eprintln!("cuda-recorder: {variable}={path}: cannot be loaded");
            return None;
        }
        Some(library as usize)
    };
    // First the driver: cuBLASLt finds it by its name then.
    let driver = *DRIVER.get_or_init(|| open("CUDA_RECORD_DRIVER"));
    let library = if symbol.starts_with("cublas") {
        *CUBLASLT.get_or_init(|| open("CUDA_RECORD_CUBLASLT"))
    } else {
        driver
    };
    let name = CString::new(symbol).ok()?;
    // SAFETY: the library stays loaded, and the name ends in zero.
    let address = unsafe { libc::dlsym(library? as *mut c_void, name.as_ptr()) };
    if address.is_null() {
        return None;
    }
    // SAFETY: all recorded functions take integers and pointers only, at most 16, each in a register or
    // an eight-byte slot that the caller removes; they return an integer.
    Some(unsafe { std::mem::transmute::<*mut c_void, Function>(address) })
}

impl Trace {
    fn open() -> Option<Trace> {
        let path = env::var_os("CUDA_RECORD").filter(|path| !path.is_empty())?;
        let limit = env::var("CUDA_RECORD_LINES").ok().and_then(|lines| lines.parse().ok());
        match File::options().create(true).append(true).open(&path) {
            Ok(file) => Some(Trace {
                file,
                lines_left: limit.unwrap_or(100_000),
                handles: HashMap::new(),
                allocations: BTreeMap::new(),
                allocated: 0,
                algorithms: HashMap::new(),
                threads: HashMap::new(),
            }),
            Err(e) => {
                eprintln!("cuda-recorder: {}: {e}", path.display());
                None
            }
        }
    }

    fn record(
        &mut self,
        symbol: &'static str,
        kinds: &[Kind],
        args: &[usize],
        make: impl FnOnce() -> usize,
    ) -> usize {
        if self.lines_left == 0 {
            return make();
        }
        self.lines_left -= 1;
        let next = self.threads.len();
        let thread = *self.threads.entry(thread::current().id()).or_insert(next);
        let mut line = format!("{{\"thread\":{thread},\"call\":\"{symbol}\",\"args\":[");
        for (index, (&kind, &arg)) in kinds.iter().zip(args).enumerate() {
            let separator = if index == 0 { "" } else { "," };
            let _ = write!(line, "{separator}{}", self.input(kind, arg, args));
        }
        let _ = self.file.write_all(line.as_bytes());
        let code = make();
        let mut line = format!("],\"code\":{code}");
        let mut separator = ",\"out\":{";
        for (index, (&kind, &arg)) in kinds.iter().zip(args).enumerate() {
            // After an error, results are not defined; cuStreamEndCapture returns a null graph.
            if arg != 0
                && (code == 0 || symbol == "cuStreamEndCapture")
                && let Some(value) = self.output(kind, arg, args)
            {
                let _ = write!(line, "{separator}\"{index}\":{value}");
                separator = ",";
            }
        }
        line.push_str(if separator == "," { "}}\n" } else { "}\n" });
        let _ = self.file.write_all(line.as_bytes());
        code
    }

    /// An argument as JSON.
    fn input(&mut self, kind: Kind, arg: usize, args: &[usize]) -> String {
        match kind {
            Kind::Byte | Kind::Int | Kind::Size => arg.to_string(),
            Kind::Handle => self.handle(arg),
            Kind::Address => self.address(arg as u64),
            _ if arg == 0 => "null".into(),
            Kind::Text => quoted("'", text(arg)),
            Kind::Image => image(arg),
            Kind::Bytes(len) if args[len] > MAX_BYTES => format!("\"?{}\"", args[len]),
            Kind::Bytes(len) => bytes(arg, args[len]),
            Kind::Scalar => bytes(arg, 4),
            Kind::Opaque => "\"?\"".into(),
            Kind::Parameters(function) => self.parameters(arg, args[function]),
            Kind::Algorithm => {
                // SAFETY: by the C prototype the argument points to an algorithm.
                match self.algorithms.get(unsafe { &*(arg as *const [u64; 8]) }) {
                    Some(number) => format!("\"~{number}\""),
                    None => bytes(arg, 64),
                }
            }
            Kind::OutInt | Kind::OutTime => "\">4\"".into(),
            Kind::OutUuid => "\">16\"".into(),
            Kind::OutSize | Kind::OutHandle | Kind::OutAddress(_) | Kind::OutText => {
                "\">8\"".into()
            }
            Kind::OutName(len) | Kind::OutBytes(len) => format!("\">{}\"", args[len]),
            Kind::OutResult => format!("\">{}\"", size_of::<HeuristicResult>()),
            Kind::OutResults(_) => {
                // cublasLtMatmulAlgoGetHeuristic has the number asked for before them.
                format!("\">{}\"", size_of::<HeuristicResult>() * args[7])
            }
        }
    }

    /// A result as JSON; `None` if the argument is not one.
    fn output(&mut self, kind: Kind, arg: usize, args: &[usize]) -> Option<String> {
        // SAFETY: by the C prototypes, and since the call succeeded, results of these types were written.
        unsafe {
            Some(match kind {
                Kind::OutInt => (arg as *const i32).read().to_string(),
                Kind::OutSize => (arg as *const usize).read().to_string(),
                Kind::OutTime => (arg as *const f32).read().to_string(),
                Kind::OutHandle => self.handle((arg as *const usize).read()),
                Kind::OutAddress(size) => {
                    self.allocation((arg as *const u64).read(), args[size] as u64)
                }
                Kind::OutText => quoted("'", text((arg as *const usize).read())),
                Kind::OutName(_) => quoted("'", text(arg)),
                Kind::OutBytes(len) if args[len] <= MAX_BYTES => bytes(arg, args[len]),
                Kind::OutResult => self.result((arg as *const HeuristicResult).read()),
                Kind::OutResults(count) => {
                    let count = (args[count] as *const i32).read().clamp(0, 64) as usize;
                    let results = (arg as *const HeuristicResult, count);
                    let results = std::slice::from_raw_parts(results.0, results.1);
                    let results: Vec<_> = results.iter().map(|r| self.result(*r)).collect();
                    format!("[{}]", results.join(","))
                }
                _ => return None,
            })
        }
    }

    fn handle(&mut self, handle: usize) -> String {
        if handle < FIRST_HANDLE {
            return handle.to_string();
        }
        let next = self.handles.len();
        format!("\"#{}\"", self.handles.entry(handle).or_insert(next))
    }

    /// A new allocation, with the alignment of its address.
    fn allocation(&mut self, at: u64, size: u64) -> String {
        let overlaps = |(&base, &(old, _)): (&u64, &(u64, usize))| {
            (base < at + size && at < base + old).then_some(base)
        };
        let gone: Vec<u64> = self.allocations.iter().filter_map(overlaps).collect();
        for base in gone {
            self.allocations.remove(&base);
        }
        self.allocations.insert(at, (size, self.allocated));
        self.allocated += 1;
        format!("[\"@{}\",{}]", self.allocated - 1, 1u64 << at.trailing_zeros().min(20))
    }

    fn address(&self, at: u64) -> String {
        match self.allocations.range(..=at).next_back() {
            _ if at < FIRST_HANDLE as u64 => at.to_string(),
            Some((base, (size, number))) if at - base < size + (1 << 20) => {
                format!("\"@{number}+{}\"", at - base)
            }
            _ => "\"@?\"".into(),
        }
    }

    fn algorithm(&mut self, algorithm: [u64; 8]) -> String {
        let next = self.algorithms.len();
        format!("\"~{}\"", self.algorithms.entry(algorithm).or_insert(next))
    }

    fn result(&mut self, result: HeuristicResult) -> String {
        let algorithm = self.algorithm(result.algorithm);
        format!("[{algorithm},{},{},{}]", result.workspace, result.state, result.waves)
    }

    fn parameters(&self, pointers: usize, function: usize) -> String {
        let Some(info) = real("cuFuncGetParamInfo") else { return "\"?\"".into() };
        let mut all = Vec::new();
        loop {
            let (mut offset, mut size) = (0usize, 0usize);
            let [at, into] = [&raw mut offset as usize, &raw mut size as usize];
            let told = info(function, all.len(), at, into, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            if told & 0xFFFF_FFFF != 0 {
                return format!("[{}]", all.join(","));
            }
            // SAFETY: there is a pointer for each parameter, of which the driver told the size.
            let value = unsafe { (pointers as *const usize).add(all.len()).read() };
            all.push(match size {
                _ if value == 0 => "null".into(),
                8 => {
                    // SAFETY: the parameter has eight bytes.
                    let address = unsafe { (value as *const u64).read_unaligned() };
                    let known = self.address(address);
                    if known.starts_with("\"@") && known != "\"@?\"" {
                        known
                    } else {
                        bytes(value, 8)
                    }
                }
                _ if size > MAX_BYTES => format!("\"?{size}\""),
                _ => bytes(value, size),
            });
        }
    }
}

fn text(at: usize) -> &'static [u8] {
    if at == 0 {
        return b"";
    }
    // SAFETY: by the C prototype it is a string that ends in zero; it is used during the call only.
    unsafe { CStr::from_ptr(at as *const c_char) }.to_bytes()
}

fn bytes(at: usize, len: usize) -> String {
    // SAFETY: by the C prototype the memory has this length.
    let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, len) };
    let mut hex = "\"=".to_string();
    for byte in bytes {
        let _ = write!(hex, "{byte:02x}");
    }
    hex.push('"');
    hex
}

/// Short PTX as text; otherwise its kind and size.
fn image(at: usize) -> String {
    // SAFETY: every image has four bytes.
    let first = unsafe { (at as *const [u8; 4]).read_unaligned() };
    match first {
        [b'/' | b'.' | b'\n', ..] if text(at).len() <= MAX_PTX_BYTES => quoted("'", text(at)),
        [b'/' | b'.' | b'\n', ..] => format!("\"?ptx {}\"", text(at).len()),
        // The fatbin's header: magic, version, size of the header, size of the rest.
        [0x50, 0xED, 0x55, 0xBA] => {
            // SAFETY: a fatbin has a header of 16 bytes.
            let size = unsafe { (at as *const u64).add(1).read_unaligned() };
            format!("\"?fatbin {size}\"")
        }
        [a, b, c, d] => format!("\"?image {a:02x}{b:02x}{c:02x}{d:02x}\""),
    }
}

/// A JSON string of a prefix and a text.
fn quoted(prefix: &str, text: &[u8]) -> String {
    let mut quoted = format!("\"{prefix}");
    for char in String::from_utf8_lossy(text).chars() {
        match char {
            '"' | '\\' => quoted.extend(['\\', char]),
            '\n' => quoted.push_str("\\n"),
            char if char < ' ' => {
                let _ = write!(quoted, "\\u{:04x}", char as u32);
            }
            char => quoted.push(char),
        }
    }
    quoted.push('"');
    quoted
}
