//! No form without a micro-kernel: runs the micro-kernels of the suite on paper, notes the forms
//! that stand in them, and compares with what the decoder accepts.

use std::cell::RefCell;
use std::collections::BTreeSet;

use crate::{families, forms, machine, tensor};

thread_local! {
    static NOTED: RefCell<Option<BTreeSet<String>>> = const { RefCell::new(None) };
}

/// Notes the forms in the body of a micro-kernel. True while forms are only collected: then the
/// kernel need not run.
pub fn note(body: &str) -> bool {
    NOTED.with_borrow_mut(|noted| {
        let Some(noted) = noted else { return false };
        let words = body.split(|c: char| c.is_whitespace() || "{};".contains(c));
        noted.extend(words.map(ptx_race::form_of));
        true
    })
}

#[test]
fn every_form_has_a_micro_kernel() {
    NOTED.set(Some(BTreeSet::new()));
    for micro_kernels in [
        forms::integer_arithmetic,
        forms::carries_chain,
        forms::bits_and_shifts,
        forms::comparisons,
        forms::single_precision,
        forms::double_precision,
        forms::half_precision,
        forms::conversions,
        families::integers,
        families::moves_and_selects,
        families::comparisons,
        families::single_precision,
        families::half_precision,
        families::conversions,
        families::loads_and_stores,
        families::atomics,
        families::windows,
        families::traps,
        machine::shuffles,
        machine::votes_matches_and_reductions,
        machine::special_registers,
        machine::asynchronous_copies,
        machine::control_flow,
        machine::calls_pass_parameters_and_results,
        machine::barriers_of_a_block,
        tensor::ldmatrix_gives_each_lane_a_row_pair,
        tensor::movmatrix_transposes,
        tensor::mma_multiplies_what_the_layouts_say,
    ] {
        micro_kernels();
    }
    let noted = NOTED.take().unwrap_or_default();
    let missing: Vec<_> = ptx_race::forms().difference(&noted).collect();
    assert!(missing.is_empty(), "{} forms have no micro-kernel: {missing:?}", missing.len());
}
