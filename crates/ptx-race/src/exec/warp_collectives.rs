//! Instructions that look across the lanes of a warp.

use crate::fault::{Exec, FaultKind, stop};
use crate::op::{NONE, Op, ReduxOp, ShuffleMode, VoteMode};
use crate::registers::{Lanes, Reg, WARP, lanes_of};
use crate::state::Warp;

impl Warp {
    pub fn cross_lane(&mut self, op: &Op, mask: u32) -> Exec<()> {
        match *op {
            Op::Shuffle { mode, d, p, a, b, c, mask: named } => {
                self.shuffle(mode, [d, p, a, b, c, named], mask)
            }
            Op::Vote { mode, d, p, mask: named } => self.vote(mode, d, p, named, mask),
            Op::Match { all, wide, d, p, a, mask: named } => {
                self.matching(all, wide, [d, p, a, named], mask)
            }
            Op::Redux { op, d, a, mask: named } => self.redux(op, d, a, named, mask),
            Op::ActiveMask { d } => {
                u32::put(self.regs_mut(), d, &[mask; WARP], mask);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn shuffle(&mut self, mode: ShuffleMode, slots: [u32; 6], mask: u32) -> Exec<()> {
        let [d, p, a, b, c, named] = slots;
        let regs = self.regs();
        let [a, b, c, named] = [a, b, c, named].map(|slot| regs.r32[slot as usize]);
        let groups = self.member_groups(&named, mask, "shuffle")?;
        let mut out = a;
        let mut inside = [false; WARP];
        for group in groups {
            for lane in lanes_of(group) {
                let (own, b, c) = (lane as u32, b[lane] & 31, c[lane]);
                let (clamp, segment) = (c & 31, c >> 8 & 31);
                let (low, high) = (own & segment, own & segment | clamp & !segment);
                let (from, valid) = match mode {
                    // Up counts down to the segment's start, which its clamp is.
                    ShuffleMode::Up => (own.wrapping_sub(b), own >= b && own - b >= high),
                    ShuffleMode::Down => (own + b, own + b <= high),
                    ShuffleMode::Butterfly => (own ^ b, own ^ b <= high),
                    ShuffleMode::Index => {
                        let from = low | b & !segment;
                        (from, from <= high)
                    }
                };
                inside[lane] = valid;
                if !valid {
                    continue;
                }
                if group >> from & 1 == 0 {
                    let message =
                        format!("the shuffle reads lane {from}, which does not take part in it");
                    return stop(FaultKind::MissingLanes, lane, message);
                }
                out[lane] = a[from as usize];
            }
        }
        u32::put(self.regs_mut(), d, &out, mask);
        if p != NONE {
            bool::put(self.regs_mut(), p, &inside, mask);
        }
        Ok(())
    }

    fn vote(&mut self, mode: VoteMode, d: u32, p: u32, named: u32, mask: u32) -> Exec<()> {
        let votes = self.regs().pred[p as usize];
        let named = self.regs().r32[named as usize];
        for group in self.member_groups(&named, mask, "vote")? {
            let yes = votes & group;
            let answer = match mode {
                VoteMode::All => yes == group,
                VoteMode::Any => yes != 0,
                VoteMode::Uniform => yes == group || yes == 0,
                VoteMode::Ballot => {
                    u32::put(self.regs_mut(), d, &[yes; WARP], group);
                    continue;
                }
            };
            bool::put(self.regs_mut(), d, &[answer; WARP], group);
        }
        Ok(())
    }

    fn matching(&mut self, all: bool, wide: bool, slots: [u32; 4], mask: u32) -> Exec<()> {
        let [d, p, a, named] = slots;
        let regs = self.regs();
        let values: Lanes<u64> =
            if wide { regs.r64[a as usize] } else { regs.r32[a as usize].map(u64::from) };
        let named = regs.r32[named as usize];
        for group in self.member_groups(&named, mask, "match")? {
            let mut out: Lanes<u32> = [0; WARP];
            for lane in lanes_of(group) {
                let equal = lanes_of(group).filter(|&other| values[other] == values[lane]);
                out[lane] = equal.fold(0, |m, l| m | 1 << l);
            }
            if all {
                let same = out.map(|bits| bits == group);
                out = out.map(|bits| if bits == group { bits } else { 0 });
                if p != NONE {
                    bool::put(self.regs_mut(), p, &same, group);
                }
            }
            u32::put(self.regs_mut(), d, &out, group);
        }
        Ok(())
    }

    fn redux(&mut self, op: ReduxOp, d: u32, a: u32, named: u32, mask: u32) -> Exec<()> {
        let values = self.regs().r32[a as usize];
        let named = self.regs().r32[named as usize];
        for group in self.member_groups(&named, mask, "redux")? {
            let combine = |x: u32, y: u32| match op {
                ReduxOp::Add => x.wrapping_add(y),
                ReduxOp::Min(true) => (x as i32).min(y as i32) as u32,
                ReduxOp::Max(true) => (x as i32).max(y as i32) as u32,
                ReduxOp::Min(false) => x.min(y),
                ReduxOp::Max(false) => x.max(y),
                ReduxOp::And => x & y,
                ReduxOp::Or => x | y,
                ReduxOp::Xor => x ^ y,
            };
            let result = lanes_of(group).map(|lane| values[lane]).reduce(combine).unwrap_or(0);
            u32::put(self.regs_mut(), d, &[result; WARP], group);
        }
        Ok(())
    }
}
