//! The tile instructions of the processor. All `unsafe` code of [`super`] is here.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
use std::sync::OnceLock;

use super::microkernel::{
    Tile, TileConfig, check_operands, load_accumulators, multiply_and_store, zero_accumulators,
};

/// Proof that the processor has tiles and their bfloat16 products, and that this process may use them.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Amx(());

impl Amx {
    /// Asks the kernel for permission, once: the tiles' 8 KiB of state are not every process's.
    pub fn detect() -> Option<Self> {
        static USABLE: OnceLock<bool> = OnceLock::new();
        USABLE.get_or_init(|| is_supported() && is_permitted()).then_some(Self(()))
    }

    /// Sets the shapes of this thread's tiles.
    pub(super) fn configure(self, config: &TileConfig) {
        // SAFETY: the proof says that the instruction exists, and it reads the 64 bytes of `config`.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                config = in(reg) config,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, readonly),
            );
        }
    }

    /// Leaves this thread's tiles unconfigured, so that the kernel need not save them.
    pub(super) fn release(self) {
        // SAFETY: the proof says that the instruction exists; no tile's content is used after it.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, nomem),
            );
        }
    }

    /// [`super::microkernel::ConfiguredTiles::multiply`].
    pub(super) fn multiply(
        self,
        a: &[Tile],
        b: &[Tile],
        c: &mut [f32],
        stride: usize,
        accumulate: bool,
    ) {
        check_operands(a, b, c, stride);
        let (a, b, steps) = (a.as_ptr(), b.as_ptr(), a.len() / 2);
        let c = c.as_mut_ptr();
        let d = c.wrapping_add(16 * stride);
        macro_rules! run {
            ($start:expr) => {
                asm!(
                    $start,
                    multiply_and_store!(),
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    steps = inout(reg) steps => _,
                    c = in(reg) c,
                    d = in(reg) d,
                    row = in(reg) 64usize,
                    stride = in(reg) 4 * stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        // SAFETY: the proof says that the instructions exist. No configuration has larger tiles than whole ones, and without
        // one they fault. `a` and `b` are 2 * steps tiles, of which each step reads two, and `c` holds 32 rows of 32 floats
        // at this stride, all that is loaded and stored there: checked above.
        unsafe {
            if accumulate {
                run!(load_accumulators!());
            } else {
                run!(zero_accumulators!());
            }
        }
    }
}

/// True if the processor has eight tiles of 16 rows of 64 bytes, and bfloat16 products of them.
fn is_supported() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const PALETTES: u32 = 0x1d;
    if __get_cpuid_max(0).0 < PALETTES {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    let palette = __cpuid_count(PALETTES, 1);
    features & (BF16 | TILE) == BF16 | TILE
        && (palette.ebx >> 16, palette.ebx & 0xffff, palette.ecx & 0xffff) == (8, 64, 16)
}

/// Asks the kernel for the tiles' state (Linux 5.16 or later). The permission is the whole process's.
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes no pointers.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}
