//! The GEMM micro-kernel: 2 x 2 accumulator tiles, 32 x 32 outputs. Its text is assembled for the hardware and
//! interpreted by the model.

use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

use super::TileUnit;
use super::hardware::Amx;
use super::model::SoftwareTiles;

/// One operand tile: 16 rows of 16 pairs of bf16.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Tile(pub [[u32; 16]; 16]);

/// Rows and columns of the outputs of a micro-kernel.
pub(super) const BLOCK: usize = 32;

/// The first half of the micro-kernel's text if outputs are assigned.
macro_rules! zero_accumulators {
    () => {
        "tilezero tmm0
         tilezero tmm1
         tilezero tmm2
         tilezero tmm3"
    };
}

/// The first half of the micro-kernel's text if outputs accumulate.
macro_rules! load_accumulators {
    () => {
        "tileloadd tmm0, [{c} + 1*{stride}]
         tileloadd tmm1, [{c} + 1*{stride} + 64]
         tileloadd tmm2, [{d} + 1*{stride}]
         tileloadd tmm3, [{d} + 1*{stride} + 64]"
    };
}

/// The second half of the micro-kernel's text. `a` and `b` are two tiles per step, `c` and `d` the outputs' rows 0
/// and 16, `stride` the bytes between two rows of outputs, and `row` those of a tile.
macro_rules! multiply_and_store {
    () => {
        "2:
         tileloadd tmm4, [{a} + 1*{row}]
         tileloadd tmm5, [{a} + 1*{row} + 1024]
         tileloadd tmm6, [{b} + 1*{row}]
         tileloadd tmm7, [{b} + 1*{row} + 1024]
         tdpbf16ps tmm0, tmm4, tmm6
         tdpbf16ps tmm1, tmm4, tmm7
         tdpbf16ps tmm2, tmm5, tmm6
         tdpbf16ps tmm3, tmm5, tmm7
         add {a}, 2048
         add {b}, 2048
         dec {steps}
         jnz 2b
         tilestored [{c} + 1*{stride}], tmm0
         tilestored [{c} + 1*{stride} + 64], tmm1
         tilestored [{d} + 1*{stride}], tmm2
         tilestored [{d} + 1*{stride} + 64], tmm3"
    };
}

pub(super) use {load_accumulators, multiply_and_store, zero_accumulators};

/// Operand of `ldtilecfg`: the shapes of the tiles.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct TileConfig {
    pub palette: u8,
    pub start_row: u8,
    pub reserved: [u8; 14],
    /// Bytes per row, of 8 tiles in palette 1.
    pub row_bytes: [u16; 16],
    pub rows: [u8; 16],
}

/// Eight tiles of 16 rows of 64 bytes. Operands are padded to whole tiles.
pub(super) const WHOLE_TILES: TileConfig = {
    let mut config = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    let mut tile = 0;
    while tile < 8 {
        (config.row_bytes[tile], config.rows[tile]) = (64, 16);
        tile += 1;
    }
    config
};

/// Panics unless `a` and `b` are as many pairs of tiles, and `c` holds 32 rows of 32 floats at this stride.
pub(super) fn check_operands(a: &[Tile], b: &[Tile], c: &[f32], stride: usize) {
    assert!(!a.is_empty() && a.len().is_multiple_of(2) && a.len() == b.len());
    assert!(stride >= BLOCK && c.len() >= (BLOCK - 1) * stride + BLOCK);
}

/// This thread's tiles, configured until this is dropped. No other code on the thread may use tiles meanwhile.
pub(super) struct ConfiguredTiles {
    state: TileState,
    /// The configuration is the thread's: this must not move to another.
    of_this_thread: PhantomData<*mut ()>,
}

enum TileState {
    Hardware(Amx),
    Model(Box<SoftwareTiles>),
}

impl TileUnit {
    pub(super) fn configure(self) -> ConfiguredTiles {
        let state = match self {
            Self::Hardware(amx) => {
                amx.configure(&WHOLE_TILES);
                TileState::Hardware(amx)
            }
            Self::Model => {
                let mut model = Box::<SoftwareTiles>::default();
                model.configure(&WHOLE_TILES);
                TileState::Model(model)
            }
        };
        ConfiguredTiles { state, of_this_thread: PhantomData }
    }
}

impl ConfiguredTiles {
    /// `c = a b` or `c += a b` for 32 x 32 outputs, `stride` floats from row to row. `a` and `b` are two tiles per
    /// 32 components of the inner dimension: 16 rows of `a` each, and 16 columns of `b`.
    pub fn multiply(
        &mut self,
        a: &[Tile],
        b: &[Tile],
        c: &mut [f32],
        stride: usize,
        accumulate: bool,
    ) {
        match &mut self.state {
            TileState::Hardware(amx) => amx.multiply(a, b, c, stride, accumulate),
            TileState::Model(model) => {
                check_operands(a, b, c, stride);
                model.multiply(a, b, c, stride, accumulate);
            }
        }
    }
}

impl Drop for ConfiguredTiles {
    fn drop(&mut self) {
        match &mut self.state {
            TileState::Hardware(amx) => amx.release(),
            TileState::Model(model) => model.release(),
        }
    }
}
