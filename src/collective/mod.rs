//! The processes that train together, and moving bytes between them.
//!
//! Engines move bytes and add nothing, so the order of every sum is this program's own. [`Ranks`] is one
//! engine: [`alone`](Group::alone), [`threads`] (ranks in one process, for tests), [`mpi`], [`sockets`].
//! [`Group`] is what the rest of the program holds: exchanges of any length, and agreement.
//!
//! Every wait has a deadline, and its error names the call and the rank.

pub mod launcher;
pub mod mpi;
pub mod sockets;
pub mod threads;

use std::fmt;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{self, ErrorKind};

/// Time that a rank waits for the others in a step.
pub const DEADLINE: Duration = Duration::from_mins(10);
/// Exit code of a process whose group failed.
pub const GROUP_EXIT_CODE: i32 = 75;
/// Time that it waits for one that saves or tokenizes.
const PATIENCE: Duration = Duration::from_hours(24);

/// Who trains together, from the view of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// Number of this process, from 0.
    pub rank: usize,
    /// Number of all processes.
    pub size: usize,
    /// Number of this process among those of this host, from 0.
    pub local_rank: usize,
    /// Number of processes on this host.
    pub local_size: usize,
    /// Library that moves the bytes: `MPICH 5.0.2`.
    pub library: String,
}

/// An engine: moves bytes between all ranks. Every rank makes the same calls in the same order.
pub trait Ranks: Send {
    /// Number of this process and of all.
    fn world(&self) -> &World;
    /// Sends piece `i` of `from` to rank `i`; piece `i` of `into` comes from rank `i`. As many pieces as
    /// ranks, of one length.
    fn all_to_all(&mut self, from: &[u8], into: &mut [u8]) -> anyhow::Result<()>;
    /// Sends `mine` to every rank; piece `i` of `all` comes from rank `i`.
    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> anyhow::Result<()>;
    /// Sends the bytes of rank 0 to every other.
    fn broadcast(&mut self, bytes: &mut [u8]) -> anyhow::Result<()>;
    /// Sets how long a call waits for other ranks.
    fn set_deadline(&mut self, deadline: Duration);
    /// The library's own sum over all ranks, in an order of its own: for comparison. False if it has none.
    fn native_all_reduce(&mut self, _values: &mut [f32]) -> anyhow::Result<bool> {
        Ok(false)
    }
    /// A rank that is known to be gone.
    fn lost(&mut self) -> Option<usize> {
        None
    }
    /// Leaves the group in order, after the last call of all ranks.
    fn finish(&mut self) {}
    /// Ends all processes of the group.
    fn abort(&mut self, code: i32) -> !;
}

/// Longest exchange in one call of an engine, per rank, in bytes.
const MAX_PIECE_BYTES: usize = 1 << 24;

/// A group of processes that train together, shared by all parts of one of them.
#[derive(Clone)]
pub struct Group(Arc<GroupState>);

struct GroupState {
    world: World,
    ranks: Option<Mutex<Box<dyn Ranks>>>,
    deadline: Mutex<Duration>,
    /// Nanoseconds in exchanges.
    waited: AtomicU64,
    /// All ranks know that one of them failed, and end by themselves.
    agreed_to_end: AtomicBool,
}

/// Another rank failed, and tells of it itself.
#[derive(Debug)]
pub struct OtherRankFailed {
    /// Number of the rank that failed.
    pub rank: usize,
    /// Its error.
    pub message: String,
    /// The error is one of the group: see [`ErrorKind::Group`].
    pub is_group: bool,
}

impl fmt::Display for OtherRankFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}: {}", self.rank, self.message)
    }
}

impl std::error::Error for OtherRankFailed {}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.world.fmt(f)
    }
}

impl Default for Group {
    fn default() -> Self {
        Self::alone()
    }
}

impl Group {
    /// One process.
    pub fn alone() -> Self {
        let library = "one process".to_string();
        let world = World { rank: 0, size: 1, local_rank: 0, local_size: 1, library };
        Self::with(world, None)
    }

    /// The group of an engine.
    pub fn new(ranks: Box<dyn Ranks>) -> Self {
        Self::with(ranks.world().clone(), Some(Mutex::new(ranks)))
    }

    fn with(world: World, ranks: Option<Mutex<Box<dyn Ranks>>>) -> Self {
        Self(Arc::new(GroupState {
            world,
            ranks,
            deadline: Mutex::new(DEADLINE),
            waited: AtomicU64::new(0),
            agreed_to_end: AtomicBool::new(false),
        }))
    }

    /// Number of this process and of all.
    pub fn world(&self) -> &World {
        &self.0.world
    }

    /// Number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.0.world.rank
    }

    /// Number of all processes.
    pub fn size(&self) -> usize {
        self.0.world.size
    }

    /// True for rank 0, which writes and prints.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Seconds that this rank spent in exchanges so far.
    pub fn waited(&self) -> f64 {
        Duration::from_nanos(self.0.waited.load(Ordering::Relaxed)).as_secs_f64()
    }

    /// Time that a call waits for other ranks.
    pub fn deadline(&self) -> Duration {
        *lock(&self.0.deadline)
    }

    /// A rank that is known to be gone, if no call is under way.
    pub fn lost(&self) -> Option<usize> {
        self.0.ranks.as_ref()?.try_lock().ok()?.lost()
    }

    /// Sets how long every later call waits for other ranks.
    pub fn set_deadline(&self, deadline: Duration) {
        *lock(&self.0.deadline) = deadline;
        if let Some(ranks) = &self.0.ranks {
            lock(ranks).set_deadline(deadline);
        }
    }

    fn call<T>(
        &self,
        call: impl FnOnce(&mut dyn Ranks) -> anyhow::Result<T>,
    ) -> Option<anyhow::Result<T>> {
        let ranks = self.0.ranks.as_ref()?;
        let begin = Instant::now();
        let result = call(&mut **lock(ranks));
        let nanos = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.0.waited.fetch_add(nanos, Ordering::Relaxed);
        Some(result)
    }

    /// [`Group::agree`] after work of some ranks that may take long: all wait for up to a day.
    pub fn agree_patiently<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        let usual = *lock(&self.0.deadline);
        self.set_deadline(PATIENCE);
        let result = self.agree(result);
        self.set_deadline(usual);
        result
    }

    /// [`Group::agree`] after work of rank 0 that may take long: the others wait for it for up to a day, it
    /// for them as usual.
    pub fn agree_after_first<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        if self.is_first() { self.agree(result) } else { self.agree_patiently(result) }
    }

    /// [`Ranks::all_to_all`].
    pub fn all_to_all(&self, from: &[u8], into: &mut [u8]) -> anyhow::Result<()> {
        self.call(|ranks| ranks.all_to_all(from, into)).unwrap_or_else(|| {
            into.copy_from_slice(from);
            Ok(())
        })
    }

    /// [`Ranks::all_gather`].
    pub fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> anyhow::Result<()> {
        self.call(|ranks| ranks.all_gather(mine, all)).unwrap_or_else(|| {
            all.copy_from_slice(mine);
            Ok(())
        })
    }

    /// [`Ranks::native_all_reduce`].
    pub fn native_all_reduce(&self, values: &mut [f32]) -> anyhow::Result<bool> {
        self.call(|ranks| ranks.native_all_reduce(values)).unwrap_or(Ok(false))
    }

    /// Bytes of every rank, of any length each.
    pub fn gather_each(&self, mine: &[u8]) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut lengths = vec![0; 8 * self.size()];
        self.all_gather(&(mine.len() as u64).to_le_bytes(), &mut lengths)?;
        let lengths: Vec<usize> =
            lengths.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes) as usize).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut gathered = vec![Vec::new(); self.size()];
        for from in (0..longest).step_by(MAX_PIECE_BYTES) {
            let length = MAX_PIECE_BYTES.min(longest - from);
            let part = |len: usize| from.min(len)..(from + length).min(len);
            let mut piece = mine[part(mine.len())].to_vec();
            piece.resize(length, 0);
            let mut all = vec![0; length * self.size()];
            self.all_gather(&piece, &mut all)?;
            for ((gathered, piece), &len) in
                gathered.iter_mut().zip(all.chunks_exact(length)).zip(&lengths)
            {
                gathered.extend(&piece[..part(len).len()]);
            }
        }
        Ok(gathered)
    }

    /// The bytes of rank 0, which others give `None` for.
    pub fn broadcast(&self, mine: Option<Vec<u8>>) -> anyhow::Result<Vec<u8>> {
        let mut length = (mine.as_ref().map_or(0, Vec::len) as u64).to_le_bytes();
        let Some(sent) = self.call(|ranks| ranks.broadcast(&mut length)) else {
            return Ok(mine.unwrap_or_default());
        };
        sent?;
        let mut bytes = mine.unwrap_or_default();
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        for piece in bytes.chunks_mut(MAX_PIECE_BYTES) {
            self.call(|ranks| ranks.broadcast(piece)).unwrap_or(Ok(()))?;
        }
        Ok(bytes)
    }

    /// Value of rank 0, for all ranks.
    pub fn decide(&self, value: u64) -> anyhow::Result<u64> {
        if self.size() == 1 {
            return Ok(value);
        }
        let bytes = self.broadcast(self.is_first().then(|| value.to_le_bytes().to_vec()))?;
        Ok(bytes.try_into().map_or(0, u64::from_le_bytes))
    }

    /// True on all ranks if it is on one.
    pub fn any(&self, mine: bool) -> anyhow::Result<bool> {
        Ok(self.gather_each(&[u8::from(mine)])?.iter().any(|bytes| bytes == &[1]))
    }

    /// The result, if it is one on every rank. Else the error of the first rank that has one: its own there,
    /// [`OtherRankFailed`] everywhere else. An error of the exchange itself goes first.
    pub fn agree<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        if self.size() == 1 {
            return result;
        }
        let told = match &result {
            Ok(_) => Vec::new(),
            Err(why) => {
                let is_group = error::kind_of(why) == Some(ErrorKind::Group);
                format!("{}{why:#}", if is_group { 'g' } else { 'o' }).into_bytes()
            }
        };
        if self.0.agreed_to_end.load(Ordering::Relaxed) {
            return result;
        }
        let told = self.gather_each(&told)?;
        let Some((rank, text)) = told.iter().enumerate().find(|(_, text)| !text.is_empty()) else {
            return result;
        };
        self.0.agreed_to_end.store(true, Ordering::Relaxed);
        match result {
            Err(why) if rank == self.rank() => Err(why),
            _ => Err(OtherRankFailed {
                rank,
                message: String::from_utf8_lossy(&text[1..]).into_owned(),
                is_group: text[0] == b'g',
            }
            .into()),
        }
    }

    /// Fails on all ranks if `mine` is not the same everywhere; `differ` names what differs, given the bytes of
    /// rank 0 and those of another rank.
    pub fn check_same(
        &self,
        mine: &[u8],
        differ: impl Fn(usize, &[u8], &[u8]) -> anyhow::Error,
    ) -> anyhow::Result<()> {
        let all = self.gather_each(mine)?;
        let odd = all.iter().enumerate().find(|(_, other)| **other != all[0]);
        let result = odd.map_or(Ok(()), |(rank, other)| Err(differ(rank, &all[0], other)));
        // Every rank found the same: the first one tells.
        self.agree(result)
    }

    /// Leaves the group in order: after the last exchange, or after an error that all ranks agreed on.
    pub fn finish(&self) {
        self.call(|ranks| {
            ranks.finish();
            Ok(())
        });
    }

    /// Ends this process, which waits for another rank in a way that cannot be left. The others see that it is gone.
    pub fn end_process(&self, why: &str) -> ! {
        let line = format!("laam: {why}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        if let Some(mut ranks) = self.0.ranks.as_ref().and_then(|ranks| ranks.try_lock().ok()) {
            ranks.abort(GROUP_EXIT_CODE);
        }
        std::process::exit(GROUP_EXIT_CODE)
    }

    /// Ends after an error of this rank: with all others, unless they know of it and end by themselves.
    pub fn fail(&self, code: i32) {
        if self.0.agreed_to_end.load(Ordering::Relaxed) {
            return self.finish();
        }
        if let Some(ranks) = &self.0.ranks {
            lock(ranks).abort(code);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The error of a rank that waited too long.
pub(crate) fn late(
    world: &World,
    waited: Duration,
    call: &str,
    number: u64,
    who: &str,
) -> anyhow::Error {
    error::group(
        format!(
            "rank {} waited {} s in {call} (call {number}) for {who}",
            world.rank,
            waited.as_secs_f64()
        ),
        "see what the other ranks said; `rank_timeout` sets how long a rank waits, and `resume` \
         continues from the last checkpoint",
    )
}
