//! Exchanges between GPUs through NCCL, found when it is needed; nothing is linked. Bytes are moved, and
//! nothing is added: the order of every sum stays this program's own.
//!
//! A thread watches the exchanges. If one is not done by the deadline, if NCCL reports an error, or if a rank is
//! known to be gone, it aborts the communicator, which ends the kernels that wait: the next call that waits for
//! the device then returns the error. If none does, as when NCCL itself waits on the host, the process ends.

use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};
use serde::{Deserialize, Serialize};

use super::libraries;
use crate::collective::Group;
use crate::error;

/// `ncclComm_t`
type CommHandle = *mut c_void;
/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// `ncclUint8`
const BYTE: c_int = 1;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// Version from which several ranks may share a GPU.
const SHARED_GPU_VERSION: c_int = 23000;
/// Time between two looks of the thread that watches.
const LOOK: Duration = Duration::from_millis(20);
/// Time that the program has to take notice of a failure, before the process is ended.
const NOTICE_TIME: Duration = Duration::from_secs(5);
/// Time after which nobody waits for a call on the host any more: the deadline is over long before.
const CALL_TIME: Duration = Duration::from_hours(1);

macro_rules! nccl_functions {
    ($($field:ident: $symbol:literal, fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are called, by their addresses.
        struct NcclFunctions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl NcclFunctions {
            /// Finds every function; the name of one that is missing.
            fn find(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    // SAFETY: nccl.h gives the symbol this prototype, since NCCL 2.14.
                    $($field: *unsafe { library.get($symbol.as_bytes()) }.map_err(|_| $symbol)?,)*
                })
            }
        }
    };
}

nccl_functions! {
    get_version: "ncclGetVersion", fn(*mut c_int) -> c_int;
    get_unique_id: "ncclGetUniqueId", fn(*mut UniqueId) -> c_int;
    comm_init_rank: "ncclCommInitRank", fn(*mut CommHandle, c_int, UniqueId, c_int) -> c_int;
    comm_get_async_error: "ncclCommGetAsyncError", fn(CommHandle, *mut c_int) -> c_int;
    comm_abort: "ncclCommAbort", fn(CommHandle) -> c_int;
    group_start: "ncclGroupStart", fn() -> c_int;
    group_end: "ncclGroupEnd", fn() -> c_int;
    send: "ncclSend", fn(u64, usize, c_int, c_int, CommHandle, sys::CUstream) -> c_int;
    recv: "ncclRecv", fn(u64, usize, c_int, c_int, CommHandle, sys::CUstream) -> c_int;
    all_gather: "ncclAllGather", fn(u64, u64, usize, c_int, CommHandle, sys::CUstream) -> c_int;
    get_error_string: "ncclGetErrorString", fn(c_int) -> *const c_char;
    get_last_error: "ncclGetLastError", fn(CommHandle) -> *const c_char;
}

/// An NCCL that is loaded, and stays so.
pub struct NcclLibrary {
    functions: NcclFunctions,
    /// Its file.
    pub path: PathBuf,
    /// 23203 for 2.32.3.
    version: c_int,
}

impl NcclLibrary {
    /// `2.32.3`
    pub fn version(&self) -> String {
        let version = self.version;
        format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
    }

    fn open() -> Result<Self, String> {
        let (library, path) = libraries::open_nccl()?;
        let functions = NcclFunctions::find(&library)
            .map_err(|symbol| format!("{} has no {symbol}", path.display()))?;
        // Functions are called as long as the process lives.
        std::mem::forget(library);
        let mut version = 0;
        // SAFETY: the call writes one integer to a valid pointer.
        if unsafe { (functions.get_version)(&raw mut version) } != SUCCESS {
            return Err(format!("{} does not tell its version", path.display()));
        }
        Ok(Self { functions, path, version })
    }

    /// The error of a call, with what NCCL says of it.
    fn failed(&self, call: &str, code: c_int, comm: CommHandle) -> String {
        // SAFETY: both return constant or thread-local text, or null; null is allowed for the communicator.
        let texts = unsafe {
            [(self.functions.get_error_string)(code), (self.functions.get_last_error)(comm)]
        };
        let texts = texts.into_iter().filter(|text| !text.is_null());
        // SAFETY: texts of NCCL end in a zero byte.
        let texts =
            texts.map(|text| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned());
        let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
        format!("{call}: {}", texts.join(": ").replace('\n', " "))
    }
}

/// NCCL, loaded on first use; or why there is none.
pub fn nccl() -> Result<&'static NcclLibrary, String> {
    static LIBRARY: OnceLock<Result<NcclLibrary, String>> = OnceLock::new();
    LIBRARY.get_or_init(NcclLibrary::open).as_ref().map_err(Clone::clone)
}

/// What a rank tells the others before they use NCCL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Offer {
    /// Version, or why there is none.
    nccl: Result<c_int, String>,
    /// Identity of the GPU.
    gpu: String,
    /// Ranks that share a GPU are allowed.
    shares: bool,
}

/// Why these ranks cannot exchange through NCCL.
fn obstacle(offers: &[Offer]) -> Option<String> {
    let mut first = None;
    for (rank, offer) in offers.iter().enumerate() {
        let version = match &offer.nccl {
            Ok(version) => *version,
            Err(why) => return Some(format!("rank {rank} has no NCCL: {why}")),
        };
        if *first.get_or_insert(version) != version {
            return Some(format!("rank {rank} has another version of NCCL than rank 0"));
        }
        let other = offers[..rank].iter().position(|other| other.gpu == offer.gpu);
        if let Some(other) = other.filter(|_| !offer.shares || version < SHARED_GPU_VERSION) {
            return Some(format!("ranks {other} and {rank} share a GPU"));
        }
    }
    None
}

/// A communicator of all ranks.
pub(super) struct Communicator {
    library: &'static NcclLibrary,
    comm: SendComm,
    size: usize,
    rank: usize,
    calls: u64,
    watch: Arc<Watch>,
}

#[derive(Clone, Copy)]
struct SendComm(CommHandle);

// SAFETY: a communicator belongs to no thread; calls of it are made by one thread at a time, except for those
// that NCCL allows beside others: ncclCommGetAsyncError and ncclCommAbort.
unsafe impl Send for SendComm {}

/// Outcome of [`Communicator::open`].
pub(super) enum Exchanges {
    Nccl(Communicator),
    /// Why they are staged through the host.
    Staged(String),
}

impl Communicator {
    /// A communicator of the group's ranks, or why there is none; the same on all ranks.
    ///
    /// # Errors
    /// NCCL fails, or a rank does not come.
    pub fn open(group: &Group, context: &Arc<CudaContext>) -> anyhow::Result<Exchanges> {
        let uuid = context.uuid().map_err(|e| super::failed("querying the GPU", e))?;
        let gpu: Vec<String> =
            uuid.bytes.iter().map(|byte| format!("{:02x}", byte.cast_unsigned())).collect();
        let library = nccl();
        let shares = std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1");
        let nccl = library.as_ref().map(|library| library.version).map_err(Clone::clone);
        let own = serde_json::to_vec(&Offer { nccl, gpu: gpu.concat(), shares })?;
        let offers = group.gather_each(&own)?;
        let offers = offers.iter().map(|bytes| serde_json::from_slice(bytes));
        let offers: Vec<Offer> = offers.collect::<Result<_, _>>()?;
        let library = match (obstacle(&offers), library) {
            (None, Ok(library)) => library,
            (Some(why), _) | (None, Err(why)) => return Ok(Exchanges::Staged(why)),
        };
        let mut id = UniqueId([0; 128]);
        let made = if group.is_first() {
            // SAFETY: the call writes the id.
            match unsafe { (library.functions.get_unique_id)(&raw mut id) } {
                SUCCESS => Ok(()),
                code => {
                    let why = library.failed("ncclGetUniqueId", code, std::ptr::null_mut());
                    Err(nccl_error(0, &why))
                }
            }
        } else {
            Ok(())
        };
        group.agree(made)?;
        let bytes = group.broadcast(group.is_first().then(|| id.0.to_vec()))?;
        id.0 = bytes.try_into().map_err(|_| error::internal("an id of NCCL of another length"))?;
        let opened = Self::init(library, group, context, id);
        let comm = group.agree(opened)?;
        let watch = Watch::start(library, comm, group, context.clone());
        let (size, rank) = (group.size(), group.rank());
        Ok(Exchanges::Nccl(Self { library, comm, size, rank, calls: 0, watch }))
    }

    /// Makes a communicator in a thread, which is left alone if a rank does not come.
    fn init(
        library: &'static NcclLibrary,
        group: &Group,
        context: &Arc<CudaContext>,
        id: UniqueId,
    ) -> anyhow::Result<SendComm> {
        let (size, rank) = (group.size() as c_int, group.rank() as c_int);
        let (context, (sender, receiver)) = (context.clone(), mpsc::channel());
        thread::spawn(move || {
            let mut comm: CommHandle = std::ptr::null_mut();
            let bound = context.bind_to_thread();
            let code = match bound {
                // SAFETY: the id is rank 0's, and the GPU's context is current.
                Ok(()) => unsafe {
                    (library.functions.comm_init_rank)(&raw mut comm, size, id, rank)
                },
                Err(_) => 1,
            };
            let code = settle(library, comm, code, CALL_TIME);
            let made = match code {
                SUCCESS => Ok(SendComm(comm)),
                code => Err(library.failed("ncclCommInitRank", code, comm)),
            };
            let _ = sender.send(made);
        });
        let begin = Instant::now();
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(made) => return made.map_err(|why| nccl_error(group.rank(), &why)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(error::internal("the thread of ncclCommInitRank ended"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let who = match group.lost() {
                Some(lost) => format!("rank {lost}, which is gone"),
                None if begin.elapsed() < group.deadline() => continue,
                None => "a rank that did not come".to_string(),
            };
            return Err(crate::collective::late(
                group.world(),
                begin.elapsed(),
                "ncclCommInitRank",
                0,
                &who,
            ));
        }
    }

    /// `NCCL 2.32.3`
    pub fn describe(&self) -> String {
        format!("NCCL {}", self.library.version())
    }

    /// Sends piece `i` of `from` to rank `i`; piece `i` of `into` comes from rank `i`. Returns the number of the
    /// call.
    pub fn all_to_all(
        &mut self,
        from: u64,
        into: u64,
        piece: usize,
        stream: sys::CUstream,
    ) -> anyhow::Result<u64> {
        let (functions, SendComm(comm)) = (&self.library.functions, self.comm);
        let (size, rank) = (self.size, self.rank);
        self.call("all_to_all", || {
            // From the next rank on, so that not all send to the same one first.
            let peers = (0..size).map(|at| (rank + at) % size);
            // SAFETY: the communicator is alive, and the buffers have `piece` bytes per rank until the work on the
            // stream is done.
            unsafe {
                let mut code = (functions.group_start)();
                for peer in peers {
                    let offset = (peer * piece) as u64;
                    let (from, into) = (from + offset, into + offset);
                    let peer = peer as c_int;
                    if code == SUCCESS {
                        code = (functions.send)(from, piece, BYTE, peer, comm, stream);
                    }
                    if code == SUCCESS {
                        code = (functions.recv)(into, piece, BYTE, peer, comm, stream);
                    }
                }
                let end = (functions.group_end)();
                if code == SUCCESS { end } else { code }
            }
        })
    }

    /// Sends `piece` bytes to every rank; piece `i` of `into` comes from rank `i`. Returns the number of the call.
    pub fn all_gather(
        &mut self,
        from: u64,
        into: u64,
        piece: usize,
        stream: sys::CUstream,
    ) -> anyhow::Result<u64> {
        let (functions, SendComm(comm)) = (&self.library.functions, self.comm);
        self.call("all_gather", || {
            // SAFETY: the communicator is alive, and the buffers have `piece` bytes, and as many per rank, until the
            // work on the stream is done.
            unsafe { (functions.all_gather)(from, into, piece, BYTE, comm, stream) }
        })
    }

    fn call(&mut self, name: &'static str, call: impl FnOnce() -> c_int) -> anyhow::Result<u64> {
        self.calls += 1;
        self.watch.begin_call(name, self.calls)?;
        let SendComm(comm) = self.comm;
        let code = settle(self.library, comm, call(), CALL_TIME);
        self.watch.end_call();
        if code == SUCCESS {
            return Ok(self.calls);
        }
        self.watch.check()?;
        let why = self.library.failed(name, code, comm);
        Err(nccl_error(self.rank, &format!("{why} (call {})", self.calls)))
    }

    /// Lets the watch wait for the work that the stream has now, up to this exchange.
    pub fn mark(&self, stream: &CudaStream, call: u64) -> anyhow::Result<()> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let event =
            stream.record_event(flags).map_err(|e| super::failed("recording an event", e))?;
        self.watch.expect(event, call);
        Ok(())
    }

    /// Fails if the watch found that an exchange cannot end.
    pub fn check(&self) -> anyhow::Result<()> {
        self.watch.check()
    }
}

/// The code of a call once it is complete: with `NCCL_COMM_BLOCKING=0` it returns before.
fn settle(library: &NcclLibrary, comm: CommHandle, mut code: c_int, deadline: Duration) -> c_int {
    let begin = Instant::now();
    while code == IN_PROGRESS && !comm.is_null() && begin.elapsed() < deadline {
        thread::yield_now();
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive, and the call writes one integer.
        code = match unsafe { (library.functions.comm_get_async_error)(comm, &raw mut state) } {
            SUCCESS => state,
            failed => failed,
        };
    }
    code
}

fn nccl_error(rank: usize, why: &str) -> anyhow::Error {
    error::group(
        format!("rank {rank}: {why}"),
        "NCCL_DEBUG=INFO shows more; LAAM_NCCL=off exchanges through the hosts instead; `resume` continues \
         from the last checkpoint",
    )
}

impl Drop for Communicator {
    /// Ranks whose device is done gather their results through the host before they drop this, so that no other one
    /// needs it any more; after an error nobody may wait for them.
    fn drop(&mut self) {
        if self.watch.stop() {
            // SAFETY: the communicator is alive, is aborted once, and no work of it is under way: the device was
            // synchronized before.
            unsafe { (self.library.functions.comm_abort)(self.comm.0) };
        }
    }
}

/// What the watching thread and the one that trains know of each other.
struct Watch {
    state: Mutex<WatchState>,
}

struct WatchState {
    /// Exchanges that the device has still to do, in their order.
    expected: VecDeque<(CudaEvent, u64)>,
    /// Events of those that it did. The thread that trains destroys them: the driver may be busy with its call.
    done: Vec<CudaEvent>,
    /// A call of NCCL on the host that did not return yet: its name and number.
    on_host: Option<(&'static str, u64)>,
    /// Since when the first of them is waited for.
    since: Instant,
    failure: Option<String>,
    /// The failure was returned to the caller.
    noticed: bool,
    stopped: bool,
}

impl Watch {
    fn start(
        library: &'static NcclLibrary,
        comm: SendComm,
        group: &Group,
        context: Arc<CudaContext>,
    ) -> Arc<Watch> {
        let watch = Arc::new(Watch {
            state: Mutex::new(WatchState {
                expected: VecDeque::new(),
                done: Vec::new(),
                on_host: None,
                since: Instant::now(),
                failure: None,
                noticed: false,
                stopped: false,
            }),
        });
        let (watching, group) = (watch.clone(), group.clone());
        thread::spawn(move || watching.watch(library, comm, &group, &context));
        watch
    }

    fn lock(&self) -> MutexGuard<'_, WatchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_call(&self, name: &'static str, call: u64) -> anyhow::Result<()> {
        self.check()?;
        let mut state = self.lock();
        if state.expected.is_empty() {
            state.since = Instant::now();
        }
        state.on_host = Some((name, call));
        Ok(())
    }

    fn end_call(&self) {
        self.lock().on_host = None;
    }

    fn expect(&self, event: CudaEvent, call: u64) {
        let mut state = self.lock();
        if state.expected.is_empty() {
            state.since = Instant::now();
        }
        state.expected.push_back((event, call));
        state.done.clear();
    }

    fn check(&self) -> anyhow::Result<()> {
        let mut state = self.lock();
        let Some(why) = &state.failure else { return Ok(()) };
        let error = error::group(
            why.clone(),
            "see what the other ranks said; `rank_timeout` sets how long a rank waits, and `resume` \
             continues from the last checkpoint",
        );
        state.noticed = true;
        Err(error)
    }

    /// Ends the watch. False if the communicator failed.
    fn stop(&self) -> bool {
        let mut state = self.lock();
        state.stopped = true;
        state.noticed = true;
        state.expected.clear();
        state.done.clear();
        state.failure.is_none()
    }

    fn watch(
        &self,
        library: &'static NcclLibrary,
        comm: SendComm,
        group: &Group,
        context: &CudaContext,
    ) {
        if context.bind_to_thread().is_err() {
            return;
        }
        let rank = group.rank();
        loop {
            thread::sleep(LOOK);
            let mut state = self.lock();
            if state.stopped {
                return;
            }
            while let Some((event, _)) = state.expected.front() {
                // SAFETY: the event is alive.
                if unsafe { result::event::query(event.cu_event()) }.is_err() {
                    break;
                }
                let done = state.expected.pop_front().map(|(event, _)| event);
                state.done.extend(done);
                state.since = Instant::now();
            }
            let waits = match (state.on_host, state.expected.front()) {
                (Some((name, call)), _) => format!("{name} (call {call})"),
                (None, Some((_, call))) => format!("an exchange of the GPU (call {call})"),
                (None, None) => continue,
            };
            let mut code = SUCCESS;
            // SAFETY: the communicator is alive until the watch is stopped.
            unsafe { (library.functions.comm_get_async_error)(comm.0, &raw mut code) };
            let has_failed = code != SUCCESS && code != IN_PROGRESS;
            if has_failed {
                // If a rank is gone, its stream to this one ends within moments, and tells which it was.
                thread::sleep(LOOK);
            }
            let deadline = group.deadline();
            let why = if let Some(lost) = group.lost() {
                format!("rank {rank} lost rank {lost} in {waits}")
            } else if has_failed {
                format!("rank {rank}: {}", library.failed(&waits, code, comm.0))
            } else if state.since.elapsed() >= deadline {
                let seconds = deadline.as_secs_f64();
                format!("rank {rank} waited {seconds} s in {waits} for a rank that did not come")
            } else {
                continue;
            };
            state.failure = Some(why.clone());
            let is_on_host = state.on_host.is_some();
            drop(state);
            if !is_on_host {
                // It may wait itself.
                thread::spawn(move || {
                    let comm = comm;
                    // SAFETY: NCCL allows an abort beside other calls, and no call is made after a failure.
                    unsafe { (library.functions.comm_abort)(comm.0) };
                });
            }
            let begin = Instant::now();
            while begin.elapsed() < NOTICE_TIME {
                thread::sleep(LOOK);
                if self.lock().noticed {
                    return;
                }
            }
            group.end_process(&why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_without_a_common_nccl_are_staged() {
        let offer = |nccl: Result<c_int, &str>, gpu: &str| Offer {
            nccl: nccl.map_err(str::to_string),
            gpu: gpu.to_string(),
            shares: false,
        };
        assert_eq!(obstacle(&[offer(Ok(22707), "a"), offer(Ok(22707), "b")]), None);
        for (other, expected) in [
            (offer(Err("not found"), "b"), "rank 1 has no NCCL: not found"),
            (offer(Ok(22706), "b"), "rank 1 has another version of NCCL than rank 0"),
            (offer(Ok(22707), "a"), "ranks 0 and 1 share a GPU"),
        ] {
            assert_eq!(obstacle(&[offer(Ok(22707), "a"), other]).as_deref(), Some(expected));
        }
        let shared = |version| Offer { shares: true, ..offer(Ok(version), "a") };
        assert!(obstacle(&[shared(22900), shared(22900)]).is_some());
        assert_eq!(obstacle(&[shared(23000), shared(23000)]), None);
    }
}
