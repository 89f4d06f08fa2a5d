//! Kernels in bfloat16 for processors with AMX tiles (Sapphire Rapids and later), and a software model of the
//! tile instructions, which runs the same kernels to the same bits on any processor.
//!
//! A tile is 16 rows of 64 bytes. `tdpbf16ps` multiplies a tile of 16 x 32 bf16 by one of 32 x 16, which holds
//! pairs of rows interleaved (VNNI), and adds to a tile of 16 x 16 f32. `microkernel.rs` has the one loop of these
//! instructions, `matmul.rs` packs operands for it, and `attention.rs` is made of matmuls.

mod attention;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod hardware;
mod matmul;
mod microkernel;
mod model;

pub(super) use self::attention::{backward, forward, supports};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use self::hardware::Amx;
pub(super) use self::matmul::{matmul, workspace};

/// No tiles on other systems.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod hardware {
    use super::microkernel::{Tile, TileConfig};

    #[derive(Clone, Copy, Debug)]
    pub(in super::super) enum Amx {}

    impl Amx {
        pub fn detect() -> Option<Self> {
            None
        }

        pub(super) fn configure(self, _: &TileConfig) {
            match self {}
        }

        pub(super) fn release(self) {
            match self {}
        }

        pub(super) fn multiply(self, _: &[Tile], _: &[Tile], _: &mut [f32], _: usize, _: bool) {
            match self {}
        }
    }
}
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) use self::hardware::Amx;

/// What executes tile instructions.
#[derive(Clone, Copy, Debug)]
pub(super) enum TileUnit {
    Hardware(Amx),
    Model,
}
