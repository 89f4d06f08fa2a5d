//! The calls of traces, made again on the stand-ins: they must return the codes and results of the trace.
//!
//! `traces/` has what was recorded on a GPU. Each trace is replayed in a process of its own: this binary again,
//! with the names of the libraries and of the trace in its environment.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use serde_json::Value;
use tempfile::TempDir;

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

/// Stands for a handle or an address that no call has returned.
const NOTHING: usize = 0x5AD0_0000_DEAD_0000;
/// Bytes of `cublasLtMatmulHeuristicResult_t`.
const RESULT_BYTES: usize = 96;

/// A folder with the stand-ins under the names of the real libraries.
fn standins() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, library) in
        [("libcuda.so.1", "libcuda_standin.so"), ("libcublasLt.so.13", "libcublaslt_standin.so")]
    {
        symlink(built(library), folder.path().join(name)).unwrap();
    }
    folder
}

/// A shared library beside this test binary.
fn built(library: &str) -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().join(library);
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

/// Differences of the stand-ins from a trace.
fn replay(libraries: &Path, trace: &Path) -> Vec<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "one_trace_is_replayed", "--nocapture"]);
    command.env("CUDA_STANDIN_CUBLASLT", "130100");
    command.env("CUDA_REPLAY_TRACE", trace).env("CUDA_REPLAY_LIBRARIES", libraries);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}\n{errors}", trace.display());
    assert!(text.contains("REPLAYED"), "{}\n{text}\n{errors}", trace.display());
    text.lines().filter(|line| line.starts_with("line ")).map(str::to_string).collect()
}

#[test]
#[ignore = "a part of the other tests, which start it"]
fn one_trace_is_replayed() {
    let path = |name| std::env::var_os(name).map(PathBuf::from);
    let Some(trace) = path("CUDA_REPLAY_TRACE") else { return };
    let folder = path("CUDA_REPLAY_LIBRARIES").unwrap();
    let open = |name: &str| {
        let path = CString::new(folder.join(name).to_str().unwrap()).unwrap();
        // SAFETY: the path ends in zero, and the stand-ins' initializers do nothing.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null(), "{name}");
        library as usize
    };
    let mut replay = Replay {
        driver: open("libcuda.so.1"),
        cublaslt: open("libcublasLt.so.13"),
        ..Replay::default()
    };
    let text = fs::read_to_string(trace).unwrap();
    for (number, line) in text.lines().enumerate() {
        // The last line of a process that crashed has no code: nothing is known of the call.
        let Ok(line) = serde_json::from_str::<Value>(line) else { break };
        if let Some(difference) = replay.line(&line) {
            println!("line {}: {difference}", number + 1);
        }
    }
    println!("REPLAYED");
    // Nothing at exit waits for kernels that nobody waited for.
    // SAFETY: the process ends without its exit handlers, on purpose.
    unsafe { libc::_exit(0) };
}

/// A call on one of the threads: function, arguments.
type Job = (usize, [usize; 16]);

#[derive(Default)]
struct Replay {
    driver: usize,
    cublaslt: usize,
    handles: HashMap<String, usize>,
    addresses: HashMap<String, usize>,
    algorithms: HashMap<String, Vec<u8>>,
    threads: HashMap<u64, (Sender<Job>, Receiver<usize>)>,
    /// Memory of arguments: work that is queued may still read it.
    memory: Vec<Vec<u8>>,
}

impl Replay {
    /// Makes the call of a line, and says how it differed.
    fn line(&mut self, line: &Value) -> Option<String> {
        let name = line["call"].as_str().unwrap();
        let args = line["args"].as_array().unwrap();
        let mut raw = [0; 16];
        for (to, arg) in raw.iter_mut().zip(args) {
            *to = self.argument(arg);
        }
        let code = self.call(line["thread"].as_u64().unwrap(), name, raw)?;
        let mut differences = String::new();
        if line["code"] != code {
            let _ = write!(differences, " code {code}, must be {}", line["code"]);
        }
        if line["code"] == 0 && code == 0 || name == "cuStreamEndCapture" {
            for (index, expected) in line["out"].as_object().into_iter().flatten() {
                let index: usize = index.parse().unwrap();
                let len = args[index].as_str().unwrap()[1..].parse().unwrap();
                // SAFETY: `argument` has made a buffer of this length.
                let bytes = unsafe { std::slice::from_raw_parts(raw[index] as *const u8, len) };
                if let Some(found) = self.result(name, &raw, expected, bytes) {
                    let _ = write!(differences, " argument {index} is {found}, must be {expected}");
                }
            }
        }
        let shown = args.iter().map(|arg| arg.to_string().chars().take(40).collect::<String>());
        let shown = shown.collect::<Vec<_>>().join(", ");
        (!differences.is_empty()).then(|| format!("{name}({shown}):{differences}"))
    }

    /// Makes a call; `None` if the stand-in does not model the function.
    fn call(&mut self, thread: u64, name: &str, raw: [usize; 16]) -> Option<usize> {
        let library = if name.starts_with("cublas") { self.cublaslt } else { self.driver };
        let symbol = CString::new(name).unwrap();
        // SAFETY: the library is loaded, and the name ends in zero.
        let function = unsafe { libc::dlsym(library as *mut c_void, symbol.as_ptr()) };
        if function.is_null() {
            return None;
        }
        let (jobs, codes) = self.threads.entry(thread).or_insert_with(|| {
            let (jobs, received) = channel::<Job>();
            let (send, codes) = channel();
            thread::spawn(move || {
                for (function, raw) in received {
                    // SAFETY: as in the recorder: integers and pointers only, at most 16.
                    let function = unsafe { std::mem::transmute::<usize, Function>(function) };
                    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = raw;
                    let code = function(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p);
                    send.send(code & 0xFFFF_FFFF).unwrap();
                }
            });
            (jobs, codes)
        });
        jobs.send((function as usize, raw)).unwrap();
        Some(codes.recv().unwrap())
    }

    /// Memory that stays where it is.
    fn keep(&mut self, bytes: Vec<u8>) -> usize {
        self.memory.push(bytes);
        self.memory.last().unwrap().as_ptr() as usize
    }

    fn argument(&mut self, arg: &Value) -> usize {
        match arg {
            Value::Null => 0,
            Value::Number(number) => number.as_u64().unwrap() as usize,
            Value::Array(pointers) => {
                let pointers: Vec<usize> = pointers
                    .iter()
                    .map(|pointer| match pointer.as_str() {
                        Some(text) if text.starts_with('@') => {
                            let address = self.argument(pointer);
                            self.keep(address.to_le_bytes().to_vec())
                        }
                        _ => self.argument(pointer),
                    })
                    .collect();
                self.keep(pointers.iter().flat_map(|pointer| pointer.to_le_bytes()).collect())
            }
            Value::String(text) => {
                let (kind, rest) = text.split_at(1);
                let zeros = |len: &str| vec![0; len.parse::<usize>().unwrap().max(1)];
                match kind {
                    "#" => self.handles.get(text).copied().unwrap_or(NOTHING),
                    "@" => {
                        let (base, offset) = text.split_once('+').unwrap_or((text, "0"));
                        let base = self.addresses.get(base).copied().unwrap_or(NOTHING);
                        base + offset.parse::<usize>().unwrap()
                    }
                    "=" => self.keep(hex(rest)),
                    "'" => self.keep([rest.as_bytes(), &[0]].concat()),
                    "~" => {
                        let algorithm = self.algorithms.get(text).cloned();
                        self.keep(algorithm.unwrap_or_else(|| vec![0; 64]))
                    }
                    "?" if rest.is_empty() => self.keep(vec![0; 64]),
                    "?" | ">" => self.keep(zeros(rest)),
                    _ => panic!("{text}"),
                }
            }
            _ => panic!("{arg}"),
        }
    }

    /// Takes a result over; says what it is if it must be another.
    fn result(
        &mut self,
        name: &str,
        raw: &[usize; 16],
        expected: &Value,
        bytes: &[u8],
    ) -> Option<String> {
        let number = |bytes: &[u8]| {
            let mut wide = [0; 8];
            wide[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
            u64::from_le_bytes(wide)
        };
        match expected {
            Value::String(text) if text.starts_with('#') => {
                let handle = number(bytes) as usize;
                self.handles.insert(text.clone(), handle);
                (handle == 0).then(|| "null".to_string())
            }
            Value::String(text) if text.starts_with('=') => {
                (hex(&text[1..]) != bytes).then(|| format!("{bytes:02x?}"))
            }
            // Names of devices differ; texts of codes are the driver's.
            Value::String(text) if name.starts_with("cuGetError") => {
                // SAFETY: the driver returned a text that ends in zero, or null.
                let found = (number(bytes) != 0)
                    .then(|| unsafe { std::ffi::CStr::from_ptr(number(bytes) as *const _) });
                let found = found.map_or(String::new(), |text| text.to_string_lossy().into());
                (found != text[1..]).then_some(found)
            }
            Value::Array(parts) if parts[0].as_str().is_some_and(|part| part.starts_with('@')) => {
                self.addresses.insert(parts[0].as_str().unwrap().into(), number(bytes) as usize);
                // A program must not rely on more than the real driver gives.
                let alignment = 1u64 << number(bytes).trailing_zeros().min(8);
                let real = parts[1].as_u64().unwrap();
                (alignment > real).then(|| format!("aligned to {alignment} bytes"))
            }
            Value::Array(results) => {
                let results: Vec<&Value> =
                    if results[0].is_array() { results.iter().collect() } else { vec![expected] };
                for (result, bytes) in results.iter().zip(bytes.chunks(RESULT_BYTES)) {
                    // Its number may be that of an algorithm which the heuristic has returned before.
                    let algorithm = result[0].as_str().unwrap();
                    if bytes[..64] != [0; 64] {
                        self.algorithms.insert(algorithm.into(), bytes[..64].to_vec());
                    }
                }
                None
            }
            _ if is_free(name, raw) => None,
            Value::Number(_) => {
                let found = if bytes.len() == 4 {
                    i64::from(number(bytes) as i32)
                } else {
                    number(bytes) as i64
                };
                let shown = |found: i64| match name {
                    "cuStreamEndCapture" => "a graph".to_string(),
                    _ => found.to_string(),
                };
                (expected.as_i64() != Some(found)).then(|| shown(found))
            }
            _ => None,
        }
    }
}

/// Whether a number may be another on the stand-in: times, sizes of memory, and what the code of a real GPU
/// needs.
fn is_free(name: &str, raw: &[usize; 16]) -> bool {
    match name {
        "cuEventElapsedTime"
        | "cuEventElapsedTime_v2"
        | "cuMemGetInfo_v2"
        | "cuDeviceTotalMem_v2"
        | "cuDriverGetVersion"
        | "cuDeviceGetCount"
        | "cublasLtMatmulAlgoGetHeuristic" => true,
        // Constants, registers, versions of the code.
        "cuFuncGetAttribute" => ![0, 1, 3, 8].contains(&raw[1]),
        _ => false,
    }
}

fn hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

/// Runs a scenario of `cuda-probe` over the stand-ins with the recorder before them.
fn record(libraries: &Path, scenario: &str) -> PathBuf {
    let folder = libraries.join("recorder");
    let _ = fs::create_dir(&folder);
    for name in ["libcuda.so", "libcublasLt.so"] {
        let _ = symlink(built("libcuda_recorder.so"), folder.join(name));
    }
    let trace = libraries.join(format!("{scenario}.jsonl"));
    let mut probe = Command::new(env!("CARGO_BIN_EXE_cuda-probe"));
    probe.arg(scenario).env("LD_LIBRARY_PATH", &folder).env("CUDA_RECORD", &trace);
    probe.env("CUDA_RECORD_DRIVER", libraries.join("libcuda.so.1"));
    probe.env("CUDA_RECORD_CUBLASLT", libraries.join("libcublasLt.so.13"));
    let output = probe.output().unwrap();
    assert!(output.status.success(), "{scenario}: {output:?}");
    trace
}

/// Traces of an H200 with driver 580.159.04 (CUDA 13.0) and cuBLASLt 13.1, each after a line with its name, and the
/// differences of the stand-ins that are known, in groups with their reason. `LAAM_TRACES=write` adds differences
/// that are new to the last group.
#[test]
fn the_stand_ins_return_what_a_gpu_returned() {
    const TRACES: &str = include_str!("traces/h200.jsonl");
    let known_path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/traces/h200.differences");
    let known = fs::read_to_string(known_path).unwrap_or_default();
    let folder = standins();
    let scenarios: Vec<_> = TRACES.split("{\"scenario\":\"").skip(1).collect();
    let found: Vec<String> = thread::scope(|scope| {
        let each = scenarios.iter().map(|text| {
            let (name, lines) = text.split_once("\"}\n").unwrap();
            let path = folder.path().join(name);
            fs::write(&path, lines).unwrap();
            let libraries = folder.path();
            let replayed = scope.spawn(move || replay(libraries, &path));
            move || {
                let differences = replayed.join().unwrap();
                differences.into_iter().map(move |line| format!("{name} {line}"))
            }
        });
        let each: Vec<_> = each.collect();
        each.into_iter().flat_map(|wait| wait()).collect()
    });
    let known_lines: Vec<_> =
        known.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let new: Vec<_> = found.iter().filter(|line| !known_lines.contains(&line.as_str())).collect();
    let gone: Vec<_> =
        known_lines.iter().filter(|line| !found.iter().any(|l| l == *line)).collect();
    if std::env::var_os("LAAM_TRACES").is_some_and(|wish| wish == "write") {
        let kept = known.lines().filter(|line| !gone.contains(&line));
        let lines: Vec<_> = kept.chain(new.iter().map(|line| line.as_str())).collect();
        fs::write(known_path, lines.join("\n") + "\n").unwrap();
        return;
    }
    assert!(new.is_empty() && gone.is_empty(), "new: {new:#?}\ngone: {gone:#?}");
}

#[test]
fn a_recording_over_the_stand_ins_replays_to_itself() {
    let folder = standins();
    for scenario in ["launches", "capture-thread", "events", "matmuls-bf16"] {
        let trace = record(folder.path(), scenario);
        assert_eq!(replay(folder.path(), &trace), Vec::<String>::new(), "{scenario}");
        // A trace of other results is told from it.
        let text = fs::read_to_string(&trace).unwrap();
        let (last, changed) = (text.rfind("\"code\":0").unwrap(), folder.path().join("changed"));
        fs::write(&changed, format!("{}\"code\":7{}", &text[..last], &text[last + 8..])).unwrap();
        assert_eq!(replay(folder.path(), &changed).len(), 1, "{scenario}");
    }
}

/// Every function that the program calls has its name in the source of the program.
#[test]
fn the_recorder_has_every_function_that_laam_calls() {
    let source = include_str!("../../../../src/device/cuda/libraries.rs");
    let calls = include_str!("../src/calls.rs");
    let names = source.split('"').filter(|text| {
        (text.starts_with("cu") || text.starts_with("cublasLt"))
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            && text.contains(char::is_uppercase)
    });
    let missing: Vec<_> = names.filter(|name| !calls.contains(&format!(" {name}("))).collect();
    assert_eq!(missing, Vec::<&str>::new());
}
