//! Asynchronous copies of a warp that have not landed.

use std::collections::VecDeque;

use crate::fault::Place;
use crate::registers::{WARP, lanes_of};

#[derive(Clone, Copy)]
pub(crate) struct PendingCopy {
    pub to: u64,
    pub from: u64,
    pub size: u8,
    /// Bytes that come from memory; zeros follow.
    pub taken: u8,
    /// Number of the thread's group, once committed.
    pub group: Option<u64>,
    /// Where it was issued.
    pub place: Place,
}

/// The copies of a warp that have not landed, by thread and in order.
#[derive(Default)]
pub(crate) struct Copies {
    pub pending: Box<[VecDeque<PendingCopy>; WARP]>,
    pub committed: [u64; WARP],
}

impl Copies {
    /// `cp.async.commit_group`: even an empty group counts.
    pub fn commit(&mut self, mask: u32) {
        for lane in lanes_of(mask) {
            let group = self.committed[lane];
            for copy in self.pending[lane].iter_mut().rev() {
                if copy.group.is_some() {
                    break;
                }
                copy.group = Some(group);
            }
            self.committed[lane] += 1;
        }
    }
}
