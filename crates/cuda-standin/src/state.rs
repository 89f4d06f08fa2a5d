//! The driver's state: what exists, and what each stream has still to do.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use ptx_race::{Kernel, Memory, Module, Options};

use crate::codes::Code;
use crate::gemm::Gemm;
use crate::settings::Settings;
use crate::work::{self, Done, Op};

pub(crate) type Outcome<T = ()> = Result<T, Code>;

/// Warp instructions per launch after which a kernel counts as hung: minutes of simulation.
const MAX_INSTRUCTIONS_PER_LAUNCH: u64 = 1 << 32;

/// Bytes of copies that a stream holds back before it executes what it has.
const MAX_QUEUED_BYTES: usize = 64 << 20;

thread_local! {
    /// Handle of the context that is current on this thread; 0 for none.
    pub(crate) static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Everything that exists. Handles are numbers that are never given out twice, so that the use of a
/// destroyed object is always an error: the reference leaves it undefined.
pub(crate) struct State {
    pub settings: Settings,
    pub initialized: bool,
    next_handle: usize,
    /// Calls so far, by symbol.
    pub calls: BTreeMap<&'static str, u64>,
    kernels: u64,
    injected: u64,
    /// What slow matmuls added to the clock of events.
    delay: Duration,
    pub memory: Memory,
    /// Size of each allocation, by address.
    pub allocations: BTreeMap<u64, u64>,
    /// The error that a context was lost with before it was released.
    pub lost: Option<Code>,
    pub primary: HashMap<i32, Primary>,
    pub streams: HashMap<usize, Stream>,
    pub events: HashMap<usize, Event>,
    pub modules: HashMap<usize, LoadedModule>,
    pub functions: HashMap<usize, Function>,
    pub captures: HashMap<usize, Capture>,
    pub graphs: HashMap<usize, Vec<Node>>,
    pub execs: HashMap<usize, Exec>,
}

/// A device's primary context.
pub(crate) struct Primary {
    pub handle: usize,
    pub retained: u32,
    /// The error that made the context unusable.
    pub sticky: Option<Code>,
}

pub(crate) struct Stream {
    queue: VecDeque<Op>,
    queued_bytes: usize,
    pub capture: Option<Captured>,
}

/// A place in a capture: its handle, and the nodes that what follows depends on.
#[derive(Clone)]
pub(crate) struct Captured {
    pub capture: usize,
    tips: Vec<usize>,
}

/// A stream capture in progress.
pub(crate) struct Capture {
    nodes: Vec<Node>,
    /// The stream that it was begun on; others join it.
    origin: usize,
    thread: ThreadId,
    /// `CU_STREAM_CAPTURE_MODE_RELAXED`.
    relaxed: bool,
    /// A forbidden call has ended the capture.
    pub invalid: bool,
}

/// A node of a graph.
#[derive(Clone)]
pub(crate) struct Node {
    op: Op,
    /// The nodes that it depends on.
    after: Vec<usize>,
    /// Whether it was captured from the stream that the capture was begun on.
    is_origin: bool,
}

/// An executable graph, and its launches so far.
pub(crate) struct Exec {
    nodes: Vec<Node>,
    launches: usize,
}

impl Exec {
    pub fn new(nodes: Vec<Node>) -> Exec {
        Exec { nodes, launches: 0 }
    }

    /// The work of a launch, in an order that the edges allow: the nodes of other streams than the origin by
    /// turns as early and as late as can be, so that an edge that is missing shows in the results.
    pub fn launch(&mut self) -> Vec<Op> {
        self.launches += 1;
        let early = self.launches % 2 == 1;
        let mut order =
            Order { nodes: &self.nodes, done: vec![false; self.nodes.len()], ops: Vec::new() };
        for is_origin in [!early, early] {
            for (at, _) in
                self.nodes.iter().enumerate().filter(|(_, node)| node.is_origin == is_origin)
            {
                order.add(at);
            }
        }
        order.ops
    }
}

struct Order<'a> {
    nodes: &'a [Node],
    done: Vec<bool>,
    ops: Vec<Op>,
}

impl Order<'_> {
    /// Adds a node after those that it depends on.
    fn add(&mut self, at: usize) {
        if std::mem::replace(&mut self.done[at], true) {
            return;
        }
        for &before in &self.nodes[at].after {
            self.add(before);
        }
        self.ops.push(self.nodes[at].op.clone());
    }
}

pub(crate) struct Event {
    pub timed: bool,
    pub recordings: u64,
    /// Stream and number of the last recording.
    pub pending: Option<(usize, u64)>,
    pub at: Option<Instant>,
    /// Where it was recorded, if in a capture.
    pub captured: Option<Captured>,
}

pub(crate) struct LoadedModule {
    pub module: Module,
    pub functions: HashMap<String, usize>,
}

pub(crate) struct Function {
    pub kernel: Kernel,
    /// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
    pub max_dynamic: u64,
}

fn shared() -> &'static Mutex<State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    STATE.get_or_init(|| Mutex::new(State::new(Settings::from_env())))
}

pub(crate) fn state() -> MutexGuard<'static, State> {
    shared().lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state, if no other thread is in a call.
pub(crate) fn try_state() -> Option<MutexGuard<'static, State>> {
    shared().try_lock().ok()
}

impl State {
    pub fn new(settings: Settings) -> State {
        State {
            settings,
            initialized: false,
            next_handle: 0x5AD0_0000_0000,
            calls: BTreeMap::new(),
            kernels: 0,
            injected: 0,
            delay: Duration::ZERO,
            memory: Memory::new(),
            allocations: BTreeMap::new(),
            lost: None,
            primary: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            captures: HashMap::new(),
            graphs: HashMap::new(),
            execs: HashMap::new(),
        }
    }

    pub fn handle(&mut self) -> usize {
        self.next_handle += 16;
        self.next_handle
    }

    /// Counts a call, and returns the fault on request for it.
    pub fn count(&mut self, symbol: &'static str) -> Outcome {
        let calls = self.calls.entry(symbol).or_default();
        *calls += 1;
        let call = *calls;
        self.fault(symbol, call)
    }

    fn fault(&mut self, symbol: &str, call: u64) -> Outcome {
        let mut faults = self.settings.faults.iter();
        let Some(fault) = faults.find(|fault| fault.symbol == symbol && fault.call == call) else {
            return Ok(());
        };
        let code = fault.code;
        self.injected += 1;
        if code.is_sticky() {
            self.poison(code);
        }
        Err(code)
    }

    /// Makes the contexts unusable.
    fn poison(&mut self, code: Code) {
        self.primary.values_mut().for_each(|primary| primary.sticky = Some(code));
    }

    /// The context that is current on this thread, if it can be used.
    pub fn current(&self) -> Outcome<&Primary> {
        let current = CURRENT.get();
        if current == 0 {
            return Err(Code::INVALID_CONTEXT);
        }
        let primary = self.primary.values().find(|primary| primary.handle == current);
        let primary = primary.ok_or(Code::CONTEXT_IS_DESTROYED)?;
        match primary.sticky {
            Some(code) => Err(code),
            None => Ok(primary),
        }
    }

    /// Destroys all that a context holds.
    pub fn reset(&mut self) {
        let addresses: Vec<u64> = self.allocations.keys().copied().collect();
        for address in addresses {
            let _ = self.memory.free(address);
        }
        self.allocations.clear();
        self.streams.clear();
        self.events.clear();
        self.modules.clear();
        self.functions.clear();
        self.captures.clear();
        self.graphs.clear();
        self.execs.clear();
    }

    pub fn used(&self) -> u64 {
        self.allocations.values().sum()
    }

    /// Refuses a range that is not within one allocation (`cuMemcpy*`, `cuMemset*`:
    /// `CUDA_ERROR_INVALID_VALUE`).
    pub fn check_range(&self, at: u64, len: usize) -> Outcome {
        let before = self.allocations.range(..=at).next_back();
        let (base, size) = before.ok_or(Code::INVALID_VALUE)?;
        let inside = (at - base).checked_add(len as u64).is_some_and(|end| end <= *size);
        if inside { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// Queues an operation, or records it if the stream captures.
    pub fn submit(&mut self, stream: usize, op: Op) -> Outcome {
        let each = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        if let Some(Captured { capture, tips }) = &mut each.capture {
            let capture = self.captures.get_mut(capture).ok_or(Code::STREAM_CAPTURE_INVALIDATED)?;
            if capture.invalid {
                return Err(Code::STREAM_CAPTURE_INVALIDATED);
            }
            let after = std::mem::replace(tips, vec![capture.nodes.len()]);
            capture.nodes.push(Node { op, after, is_origin: stream == capture.origin });
            return Ok(());
        }
        if let Op::Write { bytes, .. } = &op {
            each.queued_bytes += bytes.len();
        }
        each.queue.push_back(op);
        if each.queued_bytes > MAX_QUEUED_BYTES {
            // Work may be executed at any time; an error is seen by the next call.
            let _ = self.drain(stream);
        }
        Ok(())
    }

    /// Executes all that a stream has queued.
    pub fn drain(&mut self, stream: usize) -> Outcome {
        let each = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        let queue = std::mem::take(&mut each.queue);
        each.queued_bytes = 0;
        let options = Options {
            threads: self.settings.threads,
            arch: self.settings.arch,
            max_instructions: MAX_INSTRUCTIONS_PER_LAUNCH,
            ..Options::default()
        };
        for op in queue {
            if matches!(op, Op::Kernel { .. }) {
                self.kernels += 1;
                let kernels = self.kernels;
                if let Err(code) = self.fault("kernel", kernels) {
                    self.poison(code);
                    return Err(code);
                }
            }
            if let Op::Gemm(Gemm { is_slow: 1, .. }) = op {
                self.delay += Duration::from_secs(1);
            }
            match work::execute(&op, &self.memory, &options) {
                Ok(Done::Plain) => {}
                Ok(Done::Event(event, recording, at)) => {
                    let event = self.events.get_mut(&event);
                    if let Some(event) = event.filter(|event| event.recordings == recording) {
                        event.at = Some(at + self.delay);
                    }
                }
                Err(code) => {
                    self.poison(code);
                    return Err(code);
                }
            }
        }
        Ok(())
    }

    pub fn drain_all(&mut self) -> Outcome {
        let streams: Vec<usize> = self.streams.keys().copied().collect();
        streams.into_iter().try_for_each(|stream| self.drain(stream))
    }

    /// Refuses a call that must not be made while this thread captures, and invalidates the capture:
    /// programming guide, "Prohibited and Unhandled Operations"; `cuThreadExchangeStreamCaptureMode`.
    pub fn forbid_in_capture(&mut self) -> Outcome {
        let here = thread::current().id();
        let mut found = false;
        for capture in self.captures.values_mut() {
            if capture.thread == here && !capture.relaxed {
                capture.invalid = true;
                found = true;
            }
        }
        if found { Err(Code::STREAM_CAPTURE_UNSUPPORTED) } else { Ok(()) }
    }

    /// Invalidates the capture of a stream, if it captures; a capture that is invalid already refuses the
    /// call.
    pub fn invalidate_capture(&mut self, stream: usize) -> Outcome {
        let each = self.streams.get(&stream).ok_or(Code::INVALID_HANDLE)?;
        if let Some(Captured { capture, .. }) = &each.capture
            && let Some(capture) = self.captures.get_mut(capture)
            && std::mem::replace(&mut capture.invalid, true)
        {
            return Err(Code::STREAM_CAPTURE_INVALIDATED);
        }
        Ok(())
    }

    /// `CUDA_ERROR_STREAM_CAPTURE_INVALIDATED` if a stream is in a capture that is invalid.
    pub fn check_capture(&self, stream: usize) -> Outcome {
        let each = self.streams.get(&stream).ok_or(Code::INVALID_HANDLE)?;
        let capture = each.capture.as_ref().and_then(|each| self.captures.get(&each.capture));
        match capture {
            Some(capture) if capture.invalid => Err(Code::STREAM_CAPTURE_INVALIDATED),
            _ => Ok(()),
        }
    }

    /// Refuses a call that a stream cannot capture, which invalidates its capture.
    pub fn forbid_in_capture_of(&mut self, stream: usize) -> Outcome {
        if self.streams.get(&stream).is_some_and(|stream| stream.capture.is_some()) {
            self.invalidate_capture(stream)?;
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        Ok(())
    }

    /// Refuses an event that was last recorded in a capture. Measured: that invalidates the capture, in any
    /// mode; once the capture has ended, the event is an invalid value until it is recorded again.
    pub fn refuse_captured(&mut self, event: usize) -> Outcome {
        let event = self.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        let Some(recorded) = &event.captured else { return Ok(()) };
        match self.captures.get_mut(&recorded.capture) {
            Some(capture) => {
                capture.invalid = true;
                Err(Code::CAPTURED_EVENT)
            }
            None => Err(Code::INVALID_VALUE),
        }
    }

    pub fn new_stream(&mut self) -> usize {
        let handle = self.handle();
        let stream = Stream { queue: VecDeque::new(), queued_bytes: 0, capture: None };
        self.streams.insert(handle, stream);
        handle
    }

    pub fn begin_capture(&mut self, stream: usize, relaxed: bool) -> Outcome {
        // Work queued before the capture is not part of it.
        let capture = self.handle();
        let each = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        if each.capture.is_some() {
            return Err(Code::ILLEGAL_STATE);
        }
        each.capture = Some(Captured { capture, tips: Vec::new() });
        let thread = thread::current().id();
        let begun = Capture { nodes: Vec::new(), origin: stream, thread, relaxed, invalid: false };
        self.captures.insert(capture, begun);
        Ok(())
    }

    /// "If cuStreamEndCapture is called on a stream that the capture was not begun on":
    /// `CUDA_ERROR_STREAM_CAPTURE_UNMATCHED`. If work of other streams was not joined to it:
    /// `CUDA_ERROR_STREAM_CAPTURE_UNJOINED` (programming guide, "Cross-stream Dependencies and Events").
    pub fn end_capture(&mut self, stream: usize) -> Outcome<usize> {
        let each = self.streams.get(&stream).ok_or(Code::INVALID_HANDLE)?;
        let Captured { capture: ended, tips } = each.capture.clone().ok_or(Code::ILLEGAL_STATE)?;
        let capture = self.captures.get_mut(&ended).ok_or(Code::ILLEGAL_STATE)?;
        if capture.origin != stream {
            capture.invalid = true;
            return Err(Code::STREAM_CAPTURE_UNMATCHED);
        }
        // Measured: any thread may end a capture that is invalid.
        if capture.thread != thread::current().id() && !capture.relaxed && !capture.invalid {
            return Err(Code::STREAM_CAPTURE_WRONG_THREAD);
        }
        for each in self.streams.values_mut() {
            each.capture.take_if(|captured| captured.capture == ended);
        }
        let Capture { nodes, invalid, .. } =
            self.captures.remove(&ended).ok_or(Code::ILLEGAL_STATE)?;
        if invalid {
            return Err(Code::STREAM_CAPTURE_INVALIDATED);
        }
        let mut joined = Order { nodes: &nodes, done: vec![false; nodes.len()], ops: Vec::new() };
        for tip in tips {
            joined.add(tip);
        }
        if joined.ops.len() < nodes.len() {
            return Err(Code::STREAM_CAPTURE_UNJOINED);
        }
        let handle = self.handle();
        self.graphs.insert(handle, nodes);
        Ok(handle)
    }

    /// Makes what follows on a stream wait for an event. If the event was recorded in a capture, the stream
    /// joins it: programming guide, "Cross-stream Dependencies and Events". A dependency of captured work on
    /// work outside is `CUDA_ERROR_STREAM_CAPTURE_ISOLATION`, one between two captures
    /// `CUDA_ERROR_STREAM_CAPTURE_MERGE`: both invalidate the captures. Measured: so does an event of a capture
    /// that has ended, which is an invalid value.
    pub fn wait_event(&mut self, stream: usize, event: usize) -> Outcome {
        self.check_capture(stream)?;
        let event = self.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        let (recorded, pending) = (event.captured.clone(), event.pending);
        let each = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        let refused = match (&mut each.capture, recorded) {
            // "If cuEventRecord has not been called on the event, this call is a no-op."
            (_, None) if pending.is_none() => return Ok(()),
            // Work may be executed at any time: before this call returns.
            (None, None) => return pending.map_or(Ok(()), |(stream, _)| self.drain(stream)),
            (here, Some(recorded)) if !self.captures.contains_key(&recorded.capture) => {
                (Code::INVALID_VALUE, here.iter().map(|here| here.capture).collect())
            }
            (capture @ None, Some(recorded)) => {
                *capture = Some(recorded);
                return Ok(());
            }
            (Some(here), Some(recorded)) if here.capture == recorded.capture => {
                here.tips.extend(recorded.tips);
                here.tips.sort_unstable();
                here.tips.dedup();
                return Ok(());
            }
            (Some(here), None) => (Code::STREAM_CAPTURE_ISOLATION, vec![here.capture]),
            (Some(here), Some(recorded)) => {
                (Code::STREAM_CAPTURE_MERGE, vec![here.capture, recorded.capture])
            }
        };
        for capture in refused.1 {
            self.captures.entry(capture).and_modify(|capture| capture.invalid = true);
        }
        Err(refused.0)
    }

    /// What was not given back: a process that ends well leaves none of these. Contexts and modules may
    /// live as long as the process.
    pub fn leaks(&self) -> Vec<String> {
        let mut leaks = Vec::new();
        for (count, what) in [
            (self.allocations.len(), "allocations"),
            (self.streams.len(), "streams"),
            (self.events.len(), "events"),
            (self.graphs.len(), "graphs"),
            (self.execs.len(), "executable graphs"),
        ] {
            if count > 0 {
                leaks.push(format!("{count} {what}"));
            }
        }
        leaks
    }

    /// Whether a fault was injected or a context was lost.
    pub fn has_failed(&self) -> bool {
        self.injected > 0 || self.primary.values().any(|primary| primary.sticky.is_some())
    }

    /// Calls, leaks and faults as JSON.
    pub fn report(&self) -> String {
        let calls: Vec<_> =
            self.calls.iter().map(|(name, count)| format!("\"{name}\": {count}")).collect();
        let leaks: Vec<_> = self.leaks().iter().map(|leak| format!("\"{leak}\"")).collect();
        let sticky = self.primary.values().find_map(|primary| primary.sticky);
        format!(
            "{{\"calls\": {{{}}}, \"kernels\": {}, \"leaks\": [{}], \"injected\": {}, \"sticky\": {}}}\n",
            calls.join(", "),
            self.kernels,
            leaks.join(", "),
            self.injected,
            sticky.map_or(0, |code| code.0)
        )
    }
}
