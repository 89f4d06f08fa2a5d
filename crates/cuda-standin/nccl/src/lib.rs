//! NCCL without a GPU: `libnccl.so.2` with the part that laam calls, over the stand-in CUDA driver, which must be
//! the `libcuda.so.1` that this process has loaded. Ranks are processes of one host, which meet by the name that
//! the unique id is.
//!
//! Rules are those of the NCCL user guide (<https://docs.nvidia.com/deeplearning/nccl/user-guide/>) and of `nccl.h`,
//! named in comments. Where NCCL would hang or leaves behavior undefined, the stand-in reports an error by
//! `ncclCommGetAsyncError`, and the exchange does not end before `ncclCommAbort`, as a kernel of NCCL would not.
//!
//! | variable | value |
//! | --- | --- |
//! | `CUDA_STANDIN_FAULT` | `ncclAllGather@3=3`: the third call of a symbol returns code 3 |
//! | `CUDA_STANDIN_NCCL` | version, `23203` by default |
//! | `NCCL_MULTI_RANK_GPU_ENABLE` | `1`: ranks may share a GPU |
#![warn(missing_docs)]

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::env;
use std::ffi::{CString, c_char, c_int, c_void};
use std::io::{self, ErrorKind, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

#[path = "../../src/exchange.rs"]
mod exchange;

use exchange::{Exchange, Span};

/// `ncclResult_t` other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NcclCode(c_int);

impl NcclCode {
    const UNHANDLED_CUDA_ERROR: NcclCode = NcclCode(1);
    const SYSTEM_ERROR: NcclCode = NcclCode(2);
    const INTERNAL_ERROR: NcclCode = NcclCode(3);
    const INVALID_ARGUMENT: NcclCode = NcclCode(4);
    const INVALID_USAGE: NcclCode = NcclCode(5);
    const REMOTE_ERROR: NcclCode = NcclCode(6);
}

type Outcome<T = ()> = Result<T, NcclCode>;

/// Time between two looks of work that waits at whether it is aborted.
const LOOK: Duration = Duration::from_millis(10);
/// Version from which ranks may share a GPU.
const SHARED_GPU_VERSION: c_int = 23000;

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// A communicator.
struct Comm {
    rank: usize,
    /// Streams to the other ranks.
    peers: Vec<Option<UnixStream>>,
    aborted: AtomicBool,
    error: AtomicI32,
}

/// An exchange that was called: peers, and bytes to and from each.
#[derive(Clone)]
struct Plan {
    comm: Arc<Comm>,
    name: &'static str,
    sends: Vec<(usize, usize)>,
    receives: Vec<(usize, usize)>,
}

/// A call within a group.
struct Pending {
    comm: usize,
    stream: usize,
    peer: usize,
    span: Span,
    sends: bool,
}

#[derive(Default)]
struct State {
    calls: BTreeMap<&'static str, u64>,
    next: usize,
    comms: HashMap<usize, Arc<Comm>>,
    /// By their numbers: graphs execute them again.
    plans: Vec<Plan>,
}

thread_local! {
    /// Open groups, and the calls in them.
    static GROUP: RefCell<(usize, Vec<Pending>)> = const { RefCell::new((0, Vec::new())) };
}

fn state() -> MutexGuard<'static, State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    STATE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a call, and returns the fault on request for it.
fn count(symbol: &'static str) -> Outcome {
    let mut state = state();
    let calls = state.calls.entry(symbol).or_default();
    *calls += 1;
    let wanted = format!("{symbol}@{calls}=");
    let faults = env::var("CUDA_STANDIN_FAULT").unwrap_or_default();
    let fault = faults.split(',').find_map(|fault| fault.trim().strip_prefix(&wanted));
    fault.map_or(Ok(()), |code| Err(NcclCode(code.parse().unwrap_or(3))))
}

fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(NcclCode::INVALID_ARGUMENT);
    }
    // SAFETY: the pointer is not null, and by the C prototype it points to a `T`.
    unsafe { to.write(value) };
    Ok(())
}

/// A function of the stand-in driver.
fn driver<F: Copy>(symbol: &str) -> Outcome<F> {
    let name = CString::new(symbol).map_err(|_| NcclCode::INTERNAL_ERROR)?;
    // SAFETY: the handle is that of all loaded libraries, and the name ends in a zero byte.
    let mut address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    if address.is_null() {
        // SAFETY: the library is loaded already under this name, if it is the stand-in.
        unsafe {
            let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
            if !library.is_null() {
                address = libc::dlsym(library, name.as_ptr());
            }
        }
    }
    if address.is_null() {
        eprintln!("nccl-standin: the driver is not cuda-standin: no {symbol}");
        return Err(NcclCode::UNHANDLED_CUDA_ERROR);
    }
    assert!(size_of::<F>() == size_of::<*mut c_void>(), "a function pointer");
    // SAFETY: F is a pointer to a function with the prototype of this symbol.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

macro_rules! nccl {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: $ty),*) -> c_int {
            let made = count(stringify!($name)).and_then(|()| -> Outcome { $body });
            made.err().map_or(0, |code| code.0)
        }
    )*};
}

fn version() -> c_int {
    let version = env::var("CUDA_STANDIN_NCCL").ok().and_then(|text| text.parse().ok());
    version.unwrap_or(23203)
}

nccl! {
    fn ncclGetVersion(to: *mut c_int) {
        put(to, version())
    }

    fn ncclGetUniqueId(id: *mut UniqueId) {
        let mut bytes = [0; 128];
        let mut random = || std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes[..16]);
        random().map_err(|_| NcclCode::SYSTEM_ERROR)?;
        put(id, UniqueId(bytes))
    }

    /// "ncclCommInitRank implicitly synchronizes with other ranks, so it must be called by different
    /// threads or processes". Two ranks on one GPU are `ncclInvalidUsage`.
    fn ncclCommInitRank(comm: *mut usize, size: c_int, id: UniqueId, rank: c_int) {
        if rank < 0 || rank >= size || size < 1 {
            return Err(NcclCode::INVALID_ARGUMENT);
        }
        let device: extern "C" fn() -> c_int = driver("cudaStandinDevice")?;
        let device = device();
        if device < 0 {
            return Err(NcclCode::UNHANDLED_CUDA_ERROR);
        }
        let (rank, size) = (rank as usize, size as usize);
        let met = meet(&id, rank, size, device).map_err(|why| {
            eprintln!("nccl-standin: rank {rank}: {why}");
            NcclCode::SYSTEM_ERROR
        });
        let (peers, devices) = met?;
        let shares = env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1");
        let is_twice = (1..size).any(|at| devices[..at].contains(&devices[at]));
        if is_twice && !(shares && version() >= SHARED_GPU_VERSION) {
            eprintln!("nccl-standin: duplicate GPU: the ranks' devices are {devices:?}");
            return Err(NcclCode::INVALID_USAGE);
        }
        let (aborted, error) = (AtomicBool::new(false), AtomicI32::new(0));
        let mut state = state();
        state.next += 16;
        let handle = 0x5AD2_0000_0000 + state.next;
        state.comms.insert(handle, Arc::new(Comm { rank, peers, aborted, error }));
        put(comm, handle)
    }

    fn ncclCommGetAsyncError(comm: usize, error: *mut c_int) {
        let known = state().comms.get(&comm).cloned();
        put(error, known.ok_or(NcclCode::INVALID_ARGUMENT)?.error.load(Ordering::Relaxed))
    }

    /// "Frees resources that are allocated to a communicator and aborts any ongoing operations". The handle must
    /// not be used again.
    fn ncclCommAbort(comm: usize) {
        let comm = state().comms.remove(&comm).ok_or(NcclCode::INVALID_ARGUMENT)?;
        comm.aborted.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn ncclGroupStart() {
        GROUP.with_borrow_mut(|(depth, _)| *depth += 1);
        Ok(())
    }

    /// The calls of the group are one exchange per communicator and stream.
    fn ncclGroupEnd() {
        let pending = GROUP.with_borrow_mut(|(depth, pending)| match *depth {
            0 => Err(NcclCode::INVALID_USAGE),
            1 => {
                *depth = 0;
                Ok(std::mem::take(pending))
            }
            _ => {
                *depth -= 1;
                Ok(Vec::new())
            }
        })?;
        let mut by_stream: BTreeMap<(usize, usize), Vec<Pending>> = BTreeMap::new();
        for call in pending {
            by_stream.entry((call.comm, call.stream)).or_default().push(call);
        }
        by_stream.into_iter().try_for_each(|((comm, stream), calls)| {
            let of = |sends: bool| calls.iter().filter(move |call| call.sends == sends);
            let spans = |sends| of(sends).map(|call| (call.peer, call.span)).collect::<Vec<_>>();
            submit("group", comm, stream, &spans(true), &spans(false))
        })
    }

    fn ncclSend(from: u64, count: usize, dtype: c_int, peer: c_int, comm: usize, stream: usize) {
        point_to_point(true, from, count, dtype, peer, comm, stream)
    }

    fn ncclRecv(into: u64, count: usize, dtype: c_int, peer: c_int, comm: usize, stream: usize) {
        point_to_point(false, into, count, dtype, peer, comm, stream)
    }

    fn ncclAllGather(from: u64, into: u64, count: usize, dtype: c_int, comm: usize, stream: usize) {
        if dtype != BYTE {
            return Err(NcclCode::INVALID_ARGUMENT);
        }
        let known = state().comms.get(&comm).cloned().ok_or(NcclCode::INVALID_ARGUMENT)?;
        let peers = 0..known.peers.len();
        let sends: Vec<_> = peers.clone().map(|peer| (peer, Span { at: from, bytes: count })).collect();
        let into = |peer: usize| Span { at: into + (peer * count) as u64, bytes: count };
        let receives: Vec<_> = peers.map(|peer| (peer, into(peer))).collect();
        submit("ncclAllGather", comm, stream, &sends, &receives)
    }
}

/// `ncclUint8`; other types are not modeled.
const BYTE: c_int = 1;

/// A send or receive of a group. By itself one would wait for its peer before another begins, which laam never
/// means: refused.
fn point_to_point(
    sends: bool,
    at: u64,
    bytes: usize,
    dtype: c_int,
    peer: c_int,
    comm: usize,
    stream: usize,
) -> Outcome {
    let known = state().comms.get(&comm).cloned().ok_or(NcclCode::INVALID_ARGUMENT)?;
    if dtype != BYTE || peer < 0 || peer as usize >= known.peers.len() {
        return Err(NcclCode::INVALID_ARGUMENT);
    }
    let peer = peer as usize;
    GROUP.with_borrow_mut(|(depth, pending)| {
        if *depth == 0 {
            return Err(NcclCode::INVALID_USAGE);
        }
        pending.push(Pending { comm, stream, peer, span: Span { at, bytes }, sends });
        Ok(())
    })
}

/// Hands an exchange to the driver, as work of a stream.
fn submit(
    name: &'static str,
    comm: usize,
    stream: usize,
    sends: &[(usize, Span)],
    receives: &[(usize, Span)],
) -> Outcome {
    let of =
        |spans: &[(usize, Span)]| spans.iter().map(|(peer, span)| (*peer, span.bytes)).collect();
    let number = {
        let mut state = state();
        let comm = state.comms.get(&comm).cloned().ok_or(NcclCode::INVALID_ARGUMENT)?;
        state.plans.push(Plan { comm, name, sends: of(sends), receives: of(receives) });
        state.plans.len() as u64 - 1
    };
    let spans = |spans: &[(usize, Span)]| spans.iter().map(|(_, span)| *span).collect::<Vec<_>>();
    let (sends, receives) = (spans(sends), spans(receives));
    let exchange = Exchange {
        sends: sends.as_ptr(),
        send_count: sends.len(),
        receives: receives.as_ptr(),
        receive_count: receives.len(),
        execute,
        number,
    };
    let queue: extern "C" fn(*const Exchange, usize) -> u32 = driver("cudaStandinExchange")?;
    match queue(&raw const exchange, stream) {
        0 => Ok(()),
        _ => Err(NcclCode::UNHANDLED_CUDA_ERROR),
    }
}

/// Executes an exchange, with the driver's state locked.
extern "C" fn execute(number: u64, sent: *const u8, came: *mut u8) -> u32 {
    let Some(plan) = state().plans.get(number as usize).cloned() else { return 1 };
    let sum = |parts: &[(usize, usize)]| parts.iter().map(|(_, bytes)| bytes).sum();
    // SAFETY: the driver passes as many bytes as the exchange was submitted with.
    let (sent, came) = unsafe {
        (
            std::slice::from_raw_parts(sent, sum(&plan.sends)),
            std::slice::from_raw_parts_mut(came, sum(&plan.receives)),
        )
    };
    match plan.exchange(sent, came) {
        Ok(()) => 0,
        Err(code) => {
            plan.comm.error.store(code.0, Ordering::Relaxed);
            while !plan.comm.aborted.load(Ordering::Relaxed) {
                thread::sleep(LOOK);
            }
            1
        }
    }
}

impl Plan {
    /// Sends in a thread while it receives: all messages to a rank in their order, each after its length and the
    /// first letters of the call's name.
    fn exchange(&self, sent: &[u8], came: &mut [u8]) -> Outcome {
        let comm = &*self.comm;
        let header = |bytes: usize| {
            let mut header = [0; 16];
            header[..8].copy_from_slice(&(bytes as u64).to_le_bytes());
            let name = self.name.as_bytes();
            header[8..8 + name.len().min(8)].copy_from_slice(&name[..name.len().min(8)]);
            header
        };
        // Of messages to itself.
        let mut own = Vec::new();
        let mut messages = Vec::new();
        let mut rest = sent;
        for &(peer, bytes) in &self.sends {
            let (message, later) = rest.split_at(bytes);
            rest = later;
            if peer == comm.rank { own.push(message) } else { messages.push((peer, message)) }
        }
        let mut own = own.into_iter();
        thread::scope(|scope| {
            let sending = scope.spawn(|| {
                messages.iter().try_for_each(|(peer, message)| {
                    comm.write(*peer, &header(message.len()))?;
                    comm.write(*peer, message)
                })
            });
            let mut rest = came;
            let mut receive = || {
                for &(peer, bytes) in &self.receives {
                    let (into, later) = std::mem::take(&mut rest).split_at_mut(bytes);
                    rest = later;
                    if peer == comm.rank {
                        let message = own.next().filter(|message| message.len() == bytes);
                        into.copy_from_slice(message.ok_or(NcclCode::INTERNAL_ERROR)?);
                        continue;
                    }
                    let mut theirs = [0; 16];
                    comm.read(peer, &mut theirs)?;
                    if theirs != header(bytes) {
                        eprintln!(
                            "nccl-standin: rank {} expects {bytes} bytes of {} from rank {peer}, which sends others",
                            comm.rank, self.name
                        );
                        return Err(NcclCode::INTERNAL_ERROR);
                    }
                    comm.read(peer, into)?;
                }
                Ok(())
            };
            let received = receive();
            if received.is_err() {
                comm.error.store(NcclCode::REMOTE_ERROR.0, Ordering::Relaxed);
            }
            sending.join().unwrap_or(Err(NcclCode::INTERNAL_ERROR)).and(received)
        })
    }
}

impl Comm {
    /// Repeats a call on a stream until it was done for all bytes. A peer that is gone, or an abort, is an error.
    fn all(
        &self,
        peer: usize,
        bytes: usize,
        mut call: impl FnMut(&UnixStream, usize) -> io::Result<usize>,
    ) -> Outcome {
        let stream = self.peers[peer].as_ref().ok_or(NcclCode::INTERNAL_ERROR)?;
        let mut done = 0;
        while done < bytes {
            if self.aborted.load(Ordering::Relaxed) {
                return Err(NcclCode::REMOTE_ERROR);
            }
            match call(stream, done) {
                Ok(0) => return Err(NcclCode::REMOTE_ERROR),
                Ok(count) => done += count,
                Err(why) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&why.kind()) => {}
                Err(_) => return Err(NcclCode::REMOTE_ERROR),
            }
        }
        Ok(())
    }

    fn read(&self, peer: usize, into: &mut [u8]) -> Outcome {
        self.all(peer, into.len(), |mut stream, done| stream.read(&mut into[done..]))
    }

    fn write(&self, peer: usize, from: &[u8]) -> Outcome {
        self.all(peer, from.len(), |mut stream, done| stream.write(&from[done..]))
    }
}

/// Streams to the other ranks, and the devices of all.
fn meet(
    id: &UniqueId,
    rank: usize,
    size: usize,
    device: c_int,
) -> io::Result<(Vec<Option<UnixStream>>, Vec<c_int>)> {
    let name = |rank: usize| {
        let id: Vec<String> = id.0[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        SocketAddr::from_abstract_name(format!("nccl-standin-{}-{rank}", id.concat()))
    };
    let mut peers: Vec<Option<UnixStream>> = (0..size).map(|_| None).collect();
    let mut devices = vec![device; size];
    let listener = UnixListener::bind_addr(&name(rank)?)?;
    let mut greet = |mut stream: UnixStream| -> io::Result<()> {
        let hello = [rank as u32, device as u32];
        stream.write_all(&hello.map(u32::to_le_bytes).concat())?;
        let mut theirs = [0; 8];
        stream.read_exact(&mut theirs)?;
        let [peer, device] =
            [0, 4].map(|at| u32::from_le_bytes(theirs[at..at + 4].try_into().expect("four bytes")));
        let peer = peer as usize;
        if peer >= size {
            return Err(io::Error::other(format!("a rank {peer} of {size}")));
        }
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(LOOK))?;
        devices[peer] = device as c_int;
        peers[peer] = Some(stream);
        Ok(())
    };
    for peer in 0..rank {
        // It may not listen yet.
        let stream = loop {
            match UnixStream::connect_addr(&name(peer)?) {
                Ok(stream) => break stream,
                Err(_) => thread::sleep(LOOK),
            }
        };
        greet(stream)?;
    }
    for _ in rank + 1..size {
        greet(listener.accept()?.0)?;
    }
    Ok((peers, devices))
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    let text = match code {
        0 => c"no error",
        1 => c"unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        2 => c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
        3 => c"internal error - please report this issue to the NCCL developers",
        4 => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        5 => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        6 => c"remote process exited or there was a network error",
        7 => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

/// "The last error message of the given communicator"; none is kept.
#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_comm: usize) -> *const c_char {
    c"".as_ptr()
}
