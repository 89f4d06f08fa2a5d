//! What each opcode decodes to, beyond the register-to-register forms of `int` and `float`.

use crate::compare;
use crate::convert::{self, Conversion, Scalar};
use crate::decoder::{Decoder, UNUSED};
use crate::float;
use crate::int;
use crate::op::{
    Address, Atomic, AtomicOp, AtomicType, BarrierMode, BoolOp, Call, CopyAsync, Mma, MmaType,
    NONE, Op, ReduxOp, Scope, ShuffleMode, Space, Strong, Transfer, VoteMode,
};
use crate::parse::{Operand, Result};
use crate::registers::{File, Slots};

/// Predicate slot of the carry flag.
const CARRY: u32 = 1;

pub(crate) fn decode<'a>(
    d: &mut Decoder<'a, '_>,
    name: &str,
    mods: &[&str],
    operands: &[Operand<'a>],
) -> Result<()> {
    match name {
        "ld" => load(d, mods, operands),
        "st" => store(d, mods, operands),
        "atom" | "red" => atomic(d, name == "atom", mods, operands),
        "mov" if matches!(operands, [_, Operand::Vector(_)] | [Operand::Vector(_), _]) => {
            pack(d, mods, operands)
        }
        "setp" => setp(d, mods, operands),
        "set" => set(d, mods, operands),
        "cvt" => cvt(d, mods, operands),
        "cvta" => cvta(d, mods, operands),
        "isspacep" => is_space(d, mods, operands),
        "bra" => branch(d, mods, operands),
        "brx" => branch_index(d, operands),
        "call" => call(d, operands),
        "ret" => none(d, operands, Op::Return),
        "exit" => none(d, operands, Op::Exit),
        "trap" => none(d, operands, Op::Trap),
        "bar" | "barrier" => barrier(d, mods, operands),
        "membar" => {
            let fence = Strong { acquire: true, release: true, ..order_of(mods) };
            none(d, operands, Op::Fence(fence))
        }
        "fence" => none(d, operands, Op::Fence(order_of(mods))),
        "shfl" => shuffle(d, mods, operands),
        "vote" => vote(d, mods, operands),
        "match" => matching(d, mods, operands),
        "redux" => redux(d, mods, operands),
        "activemask" => {
            let [to] = fixed(d, operands)?;
            let to = d.destination(to, File::R32)?;
            d.emit(Op::ActiveMask { d: to });
            Ok(())
        }
        "ldmatrix" => load_matrix(d, mods, operands),
        "movmatrix" => move_matrix(d, mods, operands),
        "mma" => mma(d, mods, operands),
        "cp" if mods.first() == Some(&"async") => copy_async(d, &mods[1..], operands),
        // A hint to a cache there is none of, and a pause where time is not modeled.
        "prefetch" | "nanosleep" => none(d, &[], Op::Nop),
        _ => register_form(d, name, mods, operands),
    }
}

fn unknown<T>(d: &Decoder, name: &str, mods: &[&str]) -> Result<T> {
    let dots: String = mods.iter().flat_map(|m| [".", m]).collect();
    d.fail(format!("`{name}{dots}` is not modeled"))
}

fn none(d: &mut Decoder, operands: &[Operand], op: Op) -> Result<()> {
    if !operands.is_empty() {
        return d.fail("this instruction takes no operands");
    }
    d.emit(op);
    Ok(())
}

fn fixed<'o, 'a, const N: usize>(
    d: &Decoder,
    operands: &'o [Operand<'a>],
) -> Result<[&'o Operand<'a>; N]> {
    if operands.len() == N {
        return Ok(std::array::from_fn(|i| &operands[i]));
    }
    d.fail(format!("expected {N} operands, found {}", operands.len()))
}

fn register_form<'a>(
    d: &mut Decoder<'a, '_>,
    name: &str,
    mods: &[&str],
    operands: &[Operand<'a>],
) -> Result<()> {
    if let ("mov", Some(clock), [to, _]) = (name, clock(operands), operands) {
        let to = d.destination(to, if clock { File::R64 } else { File::R32 })?;
        d.emit(Op::Clock { d: to, wide: clock });
        return Ok(());
    }
    let Some(form) = int::form(name, mods).or_else(|| float::form(name, mods)) else {
        return unknown(d, name, mods);
    };
    let chained =
        matches!((name, mods.first()), ("addc" | "subc", _) | ("add" | "sub", Some(&"cc")));
    if chained && form.src.len() == 3 {
        let [to, a, b] = fixed(d, operands)?;
        let s = [d.source(a, form.src[0], false)?, d.source(b, form.src[1], false)?, CARRY, 0];
        let to = d.destination(to, form.dst)?;
        d.emit(Op::Alu(form.run, Slots { d: to, s }));
        return Ok(());
    }
    if let ("slct", [.., ty, of_condition]) = (name, mods) {
        let [to, a, b, c] = fixed(d, operands)?;
        let is_selected_float = is_float(Some(ty));
        let s = [
            d.source(a, form.src[0], is_selected_float)?,
            d.source(b, form.src[1], is_selected_float)?,
            d.source(c, form.src[2], is_float(Some(of_condition)))?,
            0,
        ];
        let to = d.destination(to, form.dst)?;
        d.emit(Op::Alu(form.run, Slots { d: to, s }));
        return Ok(());
    }
    d.emit_form(&form, operands, is_float(mods.last()))
}

/// True if literals of a type are floats.
fn is_float(ty: Option<&&str>) -> bool {
    ty.is_some_and(|ty| matches!(*ty, "f32" | "f64"))
}

/// Whether a `mov` reads a clock, and a 64-bit one.
fn clock(operands: &[Operand]) -> Option<bool> {
    match operands {
        [_, Operand::Name("%clock" | "%clock_hi" | "%globaltimer_lo" | "%globaltimer_hi", 0)] => {
            Some(false)
        }
        [_, Operand::Name("%clock64" | "%globaltimer", 0)] => Some(true),
        _ => None,
    }
}

/// What the modifiers of a memory instruction say, in whatever order they come.
struct MemoryModifiers<'m> {
    space: Option<&'m str>,
    count: u8,
    strong: Option<Strong>,
    rest: Vec<&'m str>,
}

/// Scope and order that modifiers name; relaxed on the GPU if they name none.
fn order_of(mods: &[&str]) -> Strong {
    let named = |names: &[&str]| mods.iter().any(|modifier| names.contains(modifier));
    Strong {
        scope: if named(&["cta", "cluster"]) { Scope::Cta } else { Scope::Gpu },
        acquire: named(&["acquire", "acq_rel", "sc"]),
        release: named(&["release", "acq_rel", "sc"]),
    }
}

fn memory_modifiers<'m>(mods: &[&'m str]) -> MemoryModifiers<'m> {
    let mut m = MemoryModifiers { space: None, count: 1, strong: None, rest: vec![] };
    for &modifier in mods {
        match modifier {
            "global" | "shared" | "local" | "const" | "param" | "shared::cta" | "param::entry"
            | "param::func" => m.space = Some(modifier.split(':').next().unwrap_or_default()),
            "v2" => m.count = 2,
            "v4" => m.count = 4,
            "volatile" | "relaxed" | "acquire" | "release" | "acq_rel" => {
                m.strong = Some(order_of(mods));
            }
            "weak" | "cta" | "cluster" | "gpu" | "sys" | "nc" | "ca" | "cg" | "cs" | "lu"
            | "cv" | "wb" | "wt" | "noftz" | "uniform" => {}
            _ if modifier.starts_with("L1::") || modifier.starts_with("L2::") => {}
            _ => m.rest.push(modifier),
        }
    }
    m
}

fn space(d: &Decoder, name: Option<&str>) -> Space {
    match name {
        // Constants are global memory that nobody writes.
        Some("global" | "const") => Space::Global,
        Some("shared") => Space::Shared,
        Some("local") => Space::Local,
        Some(_) if d.is_entry() => Space::KernelParam,
        Some(_) => Space::FrameParam,
        None => Space::Generic,
    }
}

/// `ld.param` in a kernel reads its own parameters, but also what its calls return.
fn param_space<'a>(d: &mut Decoder<'a, '_>, space: Space, operand: &Operand<'a>) -> Space {
    if space == Space::KernelParam
        && let Operand::Address(name, _) = operand
        && let Ok(slot) = d.parameter(&Operand::Name(name, 0))
        && slot.offset >= d.kernel_param_bytes()
    {
        return Space::FrameParam;
    }
    space
}

fn transfer<'a>(
    d: &mut Decoder<'a, '_>,
    name: &str,
    mods: &[&str],
    register: &Operand<'a>,
    address: &Operand<'a>,
) -> Result<Transfer> {
    let m = memory_modifiers(mods);
    let [ty] = m.rest[..] else { return unknown(d, name, mods) };
    let Some(scalar) = Scalar::of(ty) else { return unknown(d, name, mods) };
    let single;
    let list = match register {
        Operand::Vector(list) => &list[..],
        other => {
            single = [other.clone()];
            &single[..]
        }
    };
    if list.len() != usize::from(m.count) {
        return d.fail(format!("expected {} registers, found {}", m.count, list.len()));
    }
    let loading = name != "st";
    let mut registers = UNUSED;
    let files: Vec<_> = list.iter().filter_map(|operand| d.register_file(operand)).collect();
    let file = files.first().copied().unwrap_or(scalar.file());
    if file == File::Pred || scalar.file() == File::R64 && file == File::R32 {
        return d.fail("the register is too narrow for what it holds");
    }
    for (slot, operand) in registers.iter_mut().zip(list) {
        *slot = if loading {
            d.destination(operand, file)?
        } else {
            d.source(operand, file, matches!(scalar, Scalar::F32 | Scalar::F64))?
        };
    }
    let space = space(d, m.space);
    Ok(Transfer {
        space: param_space(d, space, address),
        address: d.address(address)?,
        size: (scalar.bits() / 8) as u8,
        count: m.count,
        signed: matches!(scalar, Scalar::Signed(_)),
        wide: file == File::R64,
        strong: m.strong,
        registers,
    })
}

fn load<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let [to, address] = fixed(d, operands)?;
    let op = Op::Load(transfer(d, "ld", mods, to, address)?);
    d.emit(op);
    Ok(())
}

fn store<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let [address, from] = fixed(d, operands)?;
    let transfer = transfer(d, "st", mods, from, address)?;
    if transfer.space == Space::KernelParam {
        return d.fail("a kernel's parameters cannot be stored to");
    }
    d.emit(Op::Store(transfer));
    Ok(())
}

fn atomic<'a>(
    d: &mut Decoder<'a, '_>,
    returns: bool,
    mods: &[&str],
    operands: &[Operand<'a>],
) -> Result<()> {
    let name = if returns { "atom" } else { "red" };
    let m = memory_modifiers(mods);
    let [op, ty] = m.rest[..] else { return unknown(d, name, mods) };
    let op = match op {
        "add" => AtomicOp::Add,
        "exch" => AtomicOp::Exchange,
        "cas" => AtomicOp::CompareSwap,
        "min" => AtomicOp::Min,
        "max" => AtomicOp::Max,
        "inc" => AtomicOp::Inc,
        "dec" => AtomicOp::Dec,
        "and" => AtomicOp::And,
        "or" => AtomicOp::Or,
        "xor" => AtomicOp::Xor,
        _ => return unknown(d, name, mods),
    };
    let (ty, size, file) = match ty {
        "f16x2" => (AtomicType::F16x2, 4, File::R32),
        "bf16x2" => (AtomicType::Bf16x2, 4, File::R32),
        _ => {
            let Some(ty) = Scalar::of(ty) else { return unknown(d, name, mods) };
            (AtomicType::Scalar(ty), (ty.bits() / 8) as u8, ty.file())
        }
    };
    let floating = match ty {
        AtomicType::Scalar(Scalar::Unsigned(_) | Scalar::Signed(_)) => false,
        AtomicType::Scalar(_) | AtomicType::F16x2 | AtomicType::Bf16x2 => true,
    };
    if floating && op != AtomicOp::Add || m.count != 1 {
        return unknown(d, name, mods);
    }
    let floating_literal = matches!(ty, AtomicType::Scalar(Scalar::F32 | Scalar::F64));
    let (to, rest) = if returns {
        let Some((to, rest)) = operands.split_first() else {
            return d.fail("operands are missing");
        };
        (d.destination(to, file)?, rest)
    } else {
        (NONE, operands)
    };
    let three = op == AtomicOp::CompareSwap;
    if rest.len() != if three { 3 } else { 2 } {
        return d.fail("this atomic has the wrong number of operands");
    }
    let space @ (Space::Global | Space::Shared | Space::Generic) = space(d, m.space) else {
        return unknown(d, name, mods);
    };
    let atomic = Atomic {
        space,
        op,
        ty,
        address: d.address(&rest[0])?,
        d: to,
        b: d.source(&rest[1], file, floating_literal)?,
        c: if three { d.source(&rest[2], file, false)? } else { NONE },
        size,
        order: order_of(mods),
    };
    d.emit(Op::Atomic(Box::new(atomic)));
    Ok(())
}

fn pack<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let wide = match mods {
        ["b32" | "u32" | "s32" | "f32"] => false,
        ["b64" | "u64" | "s64" | "f64"] => true,
        _ => return unknown(d, "mov", mods),
    };
    let whole = if wide { File::R64 } else { File::R32 };
    let ((Operand::Vector(list), _) | (_, Operand::Vector(list))) = (&operands[0], &operands[1])
    else {
        return d.fail("expected a vector of registers");
    };
    let count = list.len();
    if !(count == 2 || wide && count == 4) {
        return d.fail("a vector here has two parts, or four of 16 bits in 64");
    }
    let mut parts = UNUSED;
    if matches!(operands[0], Operand::Vector(_)) {
        let a = d.source(&operands[1], whole, false)?;
        for (part, operand) in parts.iter_mut().zip(list) {
            if !matches!(operand, Operand::Name("_", 0)) {
                *part = d.destination(operand, File::R32)?;
            }
        }
        d.emit(Op::Unpack { a, wide, parts, count: count as u8 });
    } else {
        for (part, operand) in parts.iter_mut().zip(list) {
            *part = d.source(operand, File::R32, false)?;
        }
        let to = d.destination(&operands[0], whole)?;
        d.emit(Op::Pack { d: to, wide, parts, count: count as u8 });
    }
    Ok(())
}

fn setp<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let Some((comparison, combine, ftz, ty)) = comparison(mods) else {
        return unknown(d, "setp", mods);
    };
    let Some(form) = compare::predicate(comparison, ftz, ty) else {
        return unknown(d, "setp", mods);
    };
    let wanted = 3 + usize::from(combine.is_some());
    if operands.len() != wanted {
        return d.fail(format!("expected {wanted} operands, found {}", operands.len()));
    }
    let float = matches!(ty, "f32" | "f64");
    let a = d.source(&operands[1], form.src[0], float)?;
    let b = d.source(&operands[2], form.src[1], float)?;
    // Without a combination the other predicate is true, and `and` leaves things as they are.
    let c = match operands.get(3) {
        Some(operand) => d.source(operand, File::Pred, false)?,
        None => 0,
    };
    let (p, q) = match &operands[0] {
        Operand::Pair(p, q) => {
            let p = d.destination(&Operand::Name(p, 0), File::Pred)?;
            (p, d.destination(&Operand::Name(q, 0), File::Pred)?)
        }
        single => (d.destination(single, File::Pred)?, NONE),
    };
    let slots = Slots { d: p, s: [a, b, 0, 0] };
    match combine {
        None if q == NONE => d.emit(Op::Alu(form.run, slots)),
        combine => {
            let combine = combine.unwrap_or(BoolOp::And);
            d.emit(Op::SetP { run: form.run, slots, q, combine, c });
        }
    }
    Ok(())
}

type Comparison<'m> = (&'m str, Option<BoolOp>, bool, &'m str);

fn comparison<'m>(mods: &[&'m str]) -> Option<Comparison<'m>> {
    let (&ty, rest) = mods.split_last()?;
    let (&comparison, rest) = rest.split_first()?;
    let (mut combine, mut ftz) = (None, false);
    for &modifier in rest {
        match modifier {
            "and" => combine = Some(BoolOp::And),
            "or" => combine = Some(BoolOp::Or),
            "xor" => combine = Some(BoolOp::Xor),
            "ftz" => ftz = true,
            _ => return None,
        }
    }
    Some((comparison, combine, ftz, ty))
}

fn set<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    if let [comparison, out @ ("f16x2" | "bf16x2"), ty] = mods
        && out == ty
    {
        let Some(form) = compare::packed_set(comparison, ty) else {
            return unknown(d, "set", mods);
        };
        return d.emit_form(&form, operands, false);
    }
    // `set` is `setp` and `selp` in one.
    let [comparison, flags @ .., out, ty] = mods else { return unknown(d, "set", mods) };
    let form = match flags {
        [] => compare::predicate(comparison, false, ty),
        ["ftz"] => compare::predicate(comparison, true, ty),
        _ => None,
    };
    let yes = match *out {
        "u32" | "s32" => u64::from(u32::MAX),
        "f32" => u64::from(1f32.to_bits()),
        _ => return unknown(d, "set", mods),
    };
    let (Some(form), Some(select)) = (form, int::form("selp", &["b32"])) else {
        return unknown(d, "set", mods);
    };
    let [to, a, b] = fixed(d, operands)?;
    let float = matches!(*ty, "f32" | "f64");
    let s = [d.source(a, form.src[0], float)?, d.source(b, form.src[1], float)?, 0, 0];
    let scratch = d.slot(File::Pred);
    d.emit(Op::Alu(form.run, Slots { d: scratch, s }));
    let s = [d.number(File::R32, yes), d.number(File::R32, 0), scratch, 0];
    let to = d.destination(to, File::R32)?;
    d.emit(Op::Alu(select.run, Slots { d: to, s }));
    Ok(())
}

fn cvt<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let Some(conversion) = convert::conversion(mods) else { return unknown(d, "cvt", mods) };
    let convert = match conversion {
        Conversion::Form(form) => {
            return d.emit_form(&form, operands, is_float(mods.last()));
        }
        Conversion::General(convert) => convert,
    };
    let [to, from] = fixed(d, operands)?;
    let wider = |file: Option<File>, own: File| {
        if file == Some(File::R64) { File::R64 } else { own }
    };
    let files = [
        wider(d.register_file(from), convert.from.file()),
        wider(d.register_file(to), convert.to.file()),
    ];
    let a = d.source(from, files[0], matches!(convert.from, Scalar::F32 | Scalar::F64))?;
    let to = d.destination(to, files[1])?;
    d.emit(Op::Convert(Box::new(convert), Slots { d: to, s: [a, 0, 0, 0] }, files));
    Ok(())
}

fn cvta<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let (to_space, space) = match mods {
        ["to", space, "u64"] => (true, *space),
        [space, "u64"] => (false, *space),
        _ => return unknown(d, "cvta", mods),
    };
    let window = match space {
        "global" | "const" => 0,
        "shared" | "shared::cta" => crate::mem::SHARED_WINDOW,
        "local" => crate::mem::LOCAL_WINDOW,
        _ => return unknown(d, "cvta", mods),
    };
    let shift = if to_space { window.wrapping_neg() } else { window };
    let [to, a] = fixed(d, operands)?;
    let s = [d.source(a, File::R64, false)?, d.number(File::R64, shift), 0, 0];
    let to = d.destination(to, File::R64)?;
    let Some(form) = int::form("add", &["u64"]) else { return unknown(d, "cvta", mods) };
    d.emit(Op::Alu(form.run, Slots { d: to, s }));
    Ok(())
}

fn is_space<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let space = match mods {
        ["global"] => Space::Global,
        ["shared" | "shared::cta"] => Space::Shared,
        ["local"] => Space::Local,
        _ => return unknown(d, "isspacep", mods),
    };
    let [to, a] = fixed(d, operands)?;
    let a = d.source(a, File::R64, false)?;
    let to = d.destination(to, File::Pred)?;
    d.emit(Op::InWindow { d: to, a, space });
    Ok(())
}

fn branch<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    if !matches!(mods, [] | ["uni"]) {
        return unknown(d, "bra", mods);
    }
    let [Operand::Name(label, 0)] = operands else { return d.fail("expected a label") };
    d.emit_branch(Op::Branch { target: 0, join: 0 }, vec![label])
}

fn branch_index<'a>(d: &mut Decoder<'a, '_>, operands: &[Operand<'a>]) -> Result<()> {
    let [index, Operand::Name(table, 0)] = operands else {
        return d.fail("expected an index and a table of labels");
    };
    let index = d.source(index, File::R32, false)?;
    let Some(labels) = d.branch_table(table) else {
        return d.fail(format!("`{table}` is not a table of branch targets"));
    };
    d.emit_branch(Op::BranchIndex { index, targets: Box::default(), join: 0 }, labels)
}

fn call<'a>(d: &mut Decoder<'a, '_>, operands: &[Operand<'a>]) -> Result<()> {
    let (results, callee, arguments) = match operands {
        [Operand::List(results), callee, Operand::List(arguments), ..] => {
            (&results[..], callee, &arguments[..])
        }
        [Operand::List(results), callee] => (&results[..], callee, &[][..]),
        [callee, Operand::List(arguments), ..] => (&[][..], callee, &arguments[..]),
        [callee] => (&[][..], callee, &[][..]),
        _ => return d.fail("this call has the wrong shape"),
    };
    let arguments = arguments.iter().map(|p| d.parameter(p)).collect::<Result<Vec<_>>>()?;
    let results = results.iter().map(|p| d.parameter(p)).collect::<Result<Vec<_>>>()?;
    let callee = d.callee(callee, &arguments, &results)?;
    d.emit(Op::Call(Box::new(Call { callee, arguments, results })));
    Ok(())
}

fn barrier<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let kind: Vec<&str> =
        mods.iter().copied().filter(|m| !matches!(*m, "cta" | "aligned")).collect();
    match kind[..] {
        ["warp", "sync"] => {
            let [mask] = fixed(d, operands)?;
            let mask = d.source(mask, File::R32, false)?;
            d.emit(Op::SyncWarp { mask });
            return Ok(());
        }
        ["sync" | "arrive"] => {
            let mode = if kind[0] == "sync" { BarrierMode::Sync } else { BarrierMode::Arrive };
            if operands.is_empty() || operands.len() > 2 {
                return d.fail("a barrier takes its number and perhaps a thread count");
            }
            let id = d.source(&operands[0], File::R32, false)?;
            let count = match operands.get(1) {
                Some(count) => d.source(count, File::R32, false)?,
                None if mode == BarrierMode::Arrive => {
                    return d.fail("`bar.arrive` needs a thread count");
                }
                None => NONE,
            };
            d.emit(Op::Barrier { mode, id, count, d: NONE, p: NONE });
        }
        ["red", op, ty] => {
            let (mode, file) = match (op, ty) {
                ("popc", "u32") => (BarrierMode::Popc, File::R32),
                ("and", "pred") => (BarrierMode::And, File::Pred),
                ("or", "pred") => (BarrierMode::Or, File::Pred),
                _ => return unknown(d, "bar", mods),
            };
            let (to, id, count, p) = match operands {
                [to, id, p] => (to, id, None, p),
                [to, id, count, p] => (to, id, Some(count), p),
                _ => return d.fail("`bar.red` takes three or four operands"),
            };
            let id = d.source(id, File::R32, false)?;
            let count = match count {
                Some(count) => d.source(count, File::R32, false)?,
                None => NONE,
            };
            let p = d.source(p, File::Pred, false)?;
            let to = d.destination(to, file)?;
            d.emit(Op::Barrier { mode, id, count, d: to, p });
        }
        _ => return unknown(d, "bar", mods),
    }
    Ok(())
}

/// A destination `d|p` or `d`; p may be absent.
fn value_and_predicate<'a>(d: &mut Decoder<'a, '_>, operand: &Operand<'a>) -> Result<(u32, u32)> {
    match operand {
        Operand::Pair(value, predicate) => {
            let value = d.destination(&Operand::Name(value, 0), File::R32)?;
            Ok((value, d.destination(&Operand::Name(predicate, 0), File::Pred)?))
        }
        single => Ok((d.destination(single, File::R32)?, NONE)),
    }
}

fn shuffle<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let mode = match mods {
        ["sync", "up", "b32"] => ShuffleMode::Up,
        ["sync", "down", "b32"] => ShuffleMode::Down,
        ["sync", "bfly", "b32"] => ShuffleMode::Butterfly,
        ["sync", "idx", "b32"] => ShuffleMode::Index,
        _ => return unknown(d, "shfl", mods),
    };
    let [to, a, b, c, mask] = fixed(d, operands)?;
    let a = d.source(a, File::R32, true)?;
    let b = d.source(b, File::R32, false)?;
    let c = d.source(c, File::R32, false)?;
    let mask = d.source(mask, File::R32, false)?;
    let (to, p) = value_and_predicate(d, to)?;
    d.emit(Op::Shuffle { mode, d: to, p, a, b, c, mask });
    Ok(())
}

fn vote<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let (mode, file) = match mods {
        ["sync", "all", "pred"] => (VoteMode::All, File::Pred),
        ["sync", "any", "pred"] => (VoteMode::Any, File::Pred),
        ["sync", "uni", "pred"] => (VoteMode::Uniform, File::Pred),
        ["sync", "ballot", "b32"] => (VoteMode::Ballot, File::R32),
        _ => return unknown(d, "vote", mods),
    };
    let [to, p, mask] = fixed(d, operands)?;
    let p = d.source(p, File::Pred, false)?;
    let mask = d.source(mask, File::R32, false)?;
    let to = d.destination(to, file)?;
    d.emit(Op::Vote { mode, d: to, p, mask });
    Ok(())
}

fn matching<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let (all, wide) = match mods {
        [kind @ ("any" | "all"), "sync", ty @ ("b32" | "b64")] => (*kind == "all", *ty == "b64"),
        _ => return unknown(d, "match", mods),
    };
    let [to, a, mask] = fixed(d, operands)?;
    let a = d.source(a, if wide { File::R64 } else { File::R32 }, false)?;
    let mask = d.source(mask, File::R32, false)?;
    let (to, p) = value_and_predicate(d, to)?;
    d.emit(Op::Match { all, wide, d: to, p, a, mask });
    Ok(())
}

fn redux<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let op = match mods {
        ["sync", "add", "u32" | "s32"] => ReduxOp::Add,
        ["sync", "min", ty @ ("u32" | "s32")] => ReduxOp::Min(*ty == "s32"),
        ["sync", "max", ty @ ("u32" | "s32")] => ReduxOp::Max(*ty == "s32"),
        ["sync", "and", "b32"] => ReduxOp::And,
        ["sync", "or", "b32"] => ReduxOp::Or,
        ["sync", "xor", "b32"] => ReduxOp::Xor,
        _ => return unknown(d, "redux", mods),
    };
    let [to, a, mask] = fixed(d, operands)?;
    let a = d.source(a, File::R32, false)?;
    let mask = d.source(mask, File::R32, false)?;
    let to = d.destination(to, File::R32)?;
    d.emit(Op::Redux { op, d: to, a, mask });
    Ok(())
}

/// The registers of a vector operand, `N` at most, sources or destinations.
fn registers<'a, const N: usize>(
    d: &mut Decoder<'a, '_>,
    operand: &Operand<'a>,
    count: usize,
    destination: bool,
) -> Result<[u32; N]> {
    let single;
    let list = match operand {
        Operand::Vector(list) => &list[..],
        other => {
            single = [other.clone()];
            &single[..]
        }
    };
    if list.len() != count {
        return d.fail(format!("expected {count} registers, found {}", list.len()));
    }
    let mut slots = [NONE; N];
    for (slot, operand) in slots.iter_mut().zip(list) {
        *slot = if destination {
            d.destination(operand, File::R32)?
        } else {
            d.source(operand, File::R32, true)?
        };
    }
    Ok(slots)
}

fn load_matrix<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let (mut transpose, mut count, mut generic) = (false, 0, true);
    for modifier in mods {
        match *modifier {
            "sync" | "aligned" | "m8n8" | "b16" => {}
            "x1" => count = 1,
            "x2" => count = 2,
            "x4" => count = 4,
            "trans" => transpose = true,
            "shared" | "shared::cta" => generic = false,
            _ => return unknown(d, "ldmatrix", mods),
        }
    }
    if count == 0 || mods.last() != Some(&"b16") {
        return unknown(d, "ldmatrix", mods);
    }
    let [to, address] = fixed(d, operands)?;
    let address = d.address(address)?;
    let to = registers(d, to, count, true)?;
    d.emit(Op::LoadMatrix { address, generic, transpose, count: count as u8, d: to });
    Ok(())
}

fn move_matrix<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    if mods != ["sync", "aligned", "m8n8", "trans", "b16"] {
        return unknown(d, "movmatrix", mods);
    }
    let [to, a] = fixed(d, operands)?;
    let a = d.source(a, File::R32, false)?;
    let to = d.destination(to, File::R32)?;
    d.emit(Op::MoveMatrix { d: to, a });
    Ok(())
}

fn mma<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    let ["sync", "aligned", shape, "row", "col", to_ty, a_ty, b_ty, c_ty] = mods else {
        return unknown(d, "mma", mods);
    };
    let (ty, k) = match (*a_ty, *shape) {
        ("bf16", "m16n8k8") => (MmaType::Bf16, 8),
        ("bf16", "m16n8k16") => (MmaType::Bf16, 16),
        ("f16", "m16n8k8") => (MmaType::F16, 8),
        ("f16", "m16n8k16") => (MmaType::F16, 16),
        ("tf32", "m16n8k4") => (MmaType::Tf32, 4),
        ("tf32", "m16n8k8") => (MmaType::Tf32, 8),
        _ => return unknown(d, "mma", mods),
    };
    let halves = |ty: &str| match ty {
        "f32" => Some(false),
        "f16" if *a_ty == "f16" => Some(true),
        _ => None,
    };
    let (Some(half_d), Some(half_c), true) = (halves(to_ty), halves(c_ty), a_ty == b_ty) else {
        return unknown(d, "mma", mods);
    };
    // Bytes of a row of A over the bytes of a register, two rows per thread over four columns.
    let a_count = k * if ty == MmaType::Tf32 { 4 } else { 2 } / 8;
    let [to, a, b, c] = fixed(d, operands)?;
    let a = registers(d, a, a_count, false)?;
    let b = registers(d, b, a_count / 2, false)?;
    let c = registers(d, c, if half_c { 2 } else { 4 }, false)?;
    let to = registers(d, to, if half_d { 2 } else { 4 }, true)?;
    d.emit(Op::Mma(Box::new(Mma { ty, k, half_c, half_d, d: to, a, b, c })));
    Ok(())
}

fn copy_async<'a>(d: &mut Decoder<'a, '_>, mods: &[&str], operands: &[Operand<'a>]) -> Result<()> {
    match mods {
        ["commit_group"] => return none(d, operands, Op::CommitGroup),
        ["wait_all"] => return none(d, operands, Op::WaitAll),
        ["wait_group"] => {
            let [Operand::Number(crate::parse::Number::Int(count))] = operands else {
                return d.fail("`cp.async.wait_group` takes a constant");
            };
            let Ok(count) = u32::try_from(*count) else {
                return d.fail("this count is out of range");
            };
            d.emit(Op::WaitGroup(count));
            return Ok(());
        }
        _ => {}
    }
    let (["ca" | "cg", "shared" | "shared::cta", "global"], true) =
        (mods.get(..3).unwrap_or_default(), mods.iter().skip(3).all(|m| m.starts_with("L2::")))
    else {
        return unknown(d, "cp.async", mods);
    };
    let (to, from, size, rest) = match operands {
        [to, from, Operand::Number(crate::parse::Number::Int(size @ (4 | 8 | 16))), rest @ ..] => {
            (to, from, *size as u8, rest)
        }
        _ => return d.fail("a copy is of 4, 8 or 16 bytes"),
    };
    if mods[0] == "cg" && size != 16 {
        return d.fail("`cp.async.cg` copies 16 bytes");
    }
    let (mut source_size, mut ignore) = (NONE, NONE);
    match rest {
        [] => {}
        [operand] if d.register_file(operand) == Some(File::Pred) => {
            ignore = d.source(operand, File::Pred, false)?;
        }
        [operand] => source_size = d.source(operand, File::R32, false)?,
        _ => return d.fail("this copy has too many operands"),
    }
    let to: Address = d.address(to)?;
    let from = d.address(from)?;
    d.emit(Op::CopyAsync(Box::new(CopyAsync { to, from, size, source_size, ignore })));
    Ok(())
}
