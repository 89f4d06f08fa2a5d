//! Ranks as threads of one process, for tests: bytes go through memory.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{DEADLINE, Ranks, World, late};
use crate::error;

/// One rank of several in this process.
pub struct ThreadRanks {
    world: World,
    table: Arc<Rendezvous>,
    /// Calls so far.
    calls: u64,
    deadline: Duration,
}

/// Meeting point of the ranks of a process.
struct Rendezvous {
    round: Mutex<Round>,
    complete: Condvar,
}

/// Contribution of a rank to a call: the call's name, and bytes.
type Brought = (&'static str, Arc<[u8]>);

struct Round {
    /// Completed calls.
    number: u64,
    posted: Vec<Option<Brought>>,
    /// Contributions to the last completed call.
    last: Vec<Brought>,
}

impl ThreadRanks {
    /// So many ranks.
    pub fn new(size: usize) -> Vec<Self> {
        let round = Round { number: 0, posted: vec![None; size], last: Vec::new() };
        let table = Arc::new(Rendezvous { round: Mutex::new(round), complete: Condvar::new() });
        let world = |rank| World {
            rank,
            size,
            local_rank: rank,
            local_size: size,
            library: "threads".to_string(),
        };
        let rank =
            |rank| Self { world: world(rank), table: table.clone(), calls: 0, deadline: DEADLINE };
        (0..size).map(rank).collect()
    }

    /// Brings bytes to a call, and takes what all ranks brought.
    fn exchange(&mut self, call: &'static str, bytes: &[u8]) -> anyhow::Result<Vec<Brought>> {
        self.calls += 1;
        let begin = Instant::now();
        let table = self.table.clone();
        let mut round = table.round.lock().unwrap_or_else(PoisonError::into_inner);
        let number = round.number;
        round.posted[self.world.rank] = Some((call, bytes.into()));
        if round.posted.iter().all(Option::is_some) {
            round.last = round.posted.iter_mut().filter_map(Option::take).collect();
            round.number += 1;
            table.complete.notify_all();
        }
        while round.number == number {
            let left = self.deadline.saturating_sub(begin.elapsed());
            if left.is_zero() {
                let missing = round.posted.iter().position(Option::is_none).unwrap_or(0);
                let who = format!("rank {missing}, which did not come");
                return Err(late(&self.world, self.deadline, call, self.calls, &who));
            }
            let waited = table.complete.wait_timeout(round, left);
            round = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let all = round.last.clone();
        if let Some((rank, (other, theirs))) = all
            .iter()
            .enumerate()
            .find(|(_, (other, theirs))| *other != call || theirs.len() != bytes.len())
        {
            return Err(error::group(
                format!(
                    "rank {} is in {call} of {} bytes, rank {rank} in {other} of {}",
                    self.world.rank,
                    bytes.len(),
                    theirs.len()
                ),
                error::INTERNAL,
            ));
        }
        Ok(all)
    }
}

impl Ranks for ThreadRanks {
    fn world(&self) -> &World {
        &self.world
    }

    fn all_to_all(&mut self, from: &[u8], into: &mut [u8]) -> anyhow::Result<()> {
        let piece = from.len() / self.world.size;
        let own = self.world.rank * piece..(self.world.rank + 1) * piece;
        let all = self.exchange("all_to_all", from)?;
        for (into, (_, bytes)) in into.chunks_exact_mut(piece.max(1)).zip(all) {
            into.copy_from_slice(&bytes[own.clone()]);
        }
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> anyhow::Result<()> {
        let brought = self.exchange("all_gather", mine)?;
        for (into, (_, bytes)) in all.chunks_exact_mut(mine.len().max(1)).zip(brought) {
            into.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn broadcast(&mut self, bytes: &mut [u8]) -> anyhow::Result<()> {
        let all = self.exchange("broadcast", bytes)?;
        bytes.copy_from_slice(&all[0].1);
        Ok(())
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    fn abort(&mut self, code: i32) -> ! {
        panic!("rank {} aborts with {code}", self.world.rank)
    }
}
