//! Registers of one warp, held lane by lane so that one decoded instruction serves 32 threads in
//! a loop the compiler can vectorize.

use half::{bf16, f16};

/// Threads in a warp.
pub(crate) const WARP: usize = 32;
/// A mask with every lane in it.
pub(crate) const FULL: u32 = !0;

/// One value per lane.
pub(crate) type Lanes<T> = [T; WARP];

/// What an undefined register or an undefined result reads as: NaN as a float, far out of any
/// buffer as an address.
pub(crate) const UNDEFINED: u32 = 0xFFFF_DEAD;

/// The three register files. 16-bit registers live in the low half of 32-bit ones.
#[derive(Clone, Debug, Default)]
pub(crate) struct Regs {
    pub r32: Vec<Lanes<u32>>,
    pub r64: Vec<Lanes<u64>>,
    /// One bit per lane.
    pub pred: Vec<u32>,
}

/// Which register file a value lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum File {
    Pred,
    R32,
    R64,
}

/// Register slots of an instruction: the destination and up to four sources.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slots {
    pub d: u32,
    pub s: [u32; 4],
}

/// Executes one register-to-register instruction for the lanes of a mask.
pub(crate) type LaneFn = fn(&mut Regs, &Slots, u32);

/// An instruction form: what runs it, and the files its operands live in.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    pub run: LaneFn,
    pub dst: File,
    pub src: &'static [File],
}

/// The lanes of a mask, in order.
pub(crate) fn lanes_of(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let lane = mask.trailing_zeros() as usize;
        mask &= mask - 1;
        Some(lane)
    })
}

/// A type that a register can be read and written as.
pub(crate) trait Reg: Copy {
    const FILE: File;
    type View<'a>: Copy;
    fn view(regs: &Regs, slot: u32) -> Self::View<'_>;
    fn get(view: Self::View<'_>, lane: usize) -> Self;
    fn put(regs: &mut Regs, slot: u32, values: &Lanes<Self>, mask: u32);
}

macro_rules! reg {
    ($ty:ty, $file:ident, $field:ident, $bits:ty, |$b:ident| $from:expr, |$v:ident| $to:expr) => {
        impl Reg for $ty {
            const FILE: File = File::$file;
            type View<'a> = &'a Lanes<$bits>;
            #[inline(always)]
            fn view(regs: &Regs, slot: u32) -> &Lanes<$bits> {
                &regs.$field[slot as usize]
            }
            #[inline(always)]
            fn get(view: &Lanes<$bits>, lane: usize) -> Self {
                let $b = view[lane];
                $from
            }
            #[inline(always)]
            fn put(regs: &mut Regs, slot: u32, values: &Lanes<Self>, mask: u32) {
                let register = &mut regs.$field[slot as usize];
                if mask == FULL {
                    for lane in 0..WARP {
                        let $v = values[lane];
                        register[lane] = $to;
                    }
                } else {
                    for lane in 0..WARP {
                        let $v = values[lane];
                        if mask >> lane & 1 == 1 {
                            register[lane] = $to;
                        }
                    }
                }
            }
        }
    };
}

reg!(u32, R32, r32, u32, |b| b, |v| v);
reg!(i32, R32, r32, u32, |b| b as i32, |v| v as u32);
reg!(f32, R32, r32, u32, |b| f32::from_bits(b), |v| v.to_bits());
reg!(u16, R32, r32, u32, |b| b as u16, |v| u32::from(v));
reg!(i16, R32, r32, u32, |b| b as i16, |v| u32::from(v as u16));
reg!(f16, R32, r32, u32, |b| f16::from_bits(b as u16), |v| u32::from(v.to_bits()));
reg!(bf16, R32, r32, u32, |b| bf16::from_bits(b as u16), |v| u32::from(v.to_bits()));
reg!([f16; 2], R32, r32, u32, |b| halves(b).map(f16::from_bits), |v| packed(v.map(f16::to_bits)));
reg!([bf16; 2], R32, r32, u32, |b| halves(b).map(bf16::from_bits), |v| packed(
    v.map(bf16::to_bits)
));
reg!(u64, R64, r64, u64, |b| b, |v| v);
reg!(i64, R64, r64, u64, |b| b as i64, |v| v as u64);
reg!(f64, R64, r64, u64, |b| f64::from_bits(b), |v| v.to_bits());

impl Reg for bool {
    const FILE: File = File::Pred;
    type View<'a> = u32;
    #[inline(always)]
    fn view(regs: &Regs, slot: u32) -> u32 {
        regs.pred[slot as usize]
    }
    #[inline(always)]
    fn get(view: u32, lane: usize) -> bool {
        view >> lane & 1 == 1
    }
    #[inline(always)]
    fn put(regs: &mut Regs, slot: u32, values: &Lanes<bool>, mask: u32) {
        let mut bits = 0;
        for (lane, &value) in values.iter().enumerate() {
            bits |= u32::from(value) << lane;
        }
        let register = &mut regs.pred[slot as usize];
        *register = *register & !mask | bits & mask;
    }
}

/// The two 16-bit halves of a 32-bit register, low first.
pub(crate) fn halves(bits: u32) -> [u16; 2] {
    [bits as u16, (bits >> 16) as u16]
}

pub(crate) fn packed([low, high]: [u16; 2]) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// A register-to-register form from a statement of what one lane does:
/// `lanes!(|a: u32, b: u32| -> u32 { a.wrapping_add(b) })`.
macro_rules! lanes {
    (|$($name:ident: $ty:ty),+| -> $out:ty { $($body:tt)* }) => {{
        fn run(regs: &mut Regs, slots: &Slots, mask: u32) {
            let values: Lanes<$out> = {
                let mut sources = slots.s.iter();
                $(let $name = <$ty as Reg>::view(regs, *sources.next().expect("four sources"));)+
                std::array::from_fn(|lane| {
                    $(let $name = <$ty as Reg>::get($name, lane);)+
                    $($body)*
                })
            };
            <$out as Reg>::put(regs, slots.d, &values, mask);
        }
        Some(Form {
            run,
            dst: <$out as Reg>::FILE,
            src: const { &[$(<$ty as Reg>::FILE),+] },
        })
    }};
}
pub(crate) use lanes;
