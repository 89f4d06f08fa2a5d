// Constants that several kernels share.
#pragma once

#include "geometry.cuh"

// All lanes of a warp, for the `_sync` intrinsics.
constexpr unsigned FULL_MASK = 0xffffffffu;

// Target of a position that does not count in the loss: `laam::tokens::IGNORE`.
constexpr unsigned IGNORE_INDEX = 0xffffffffu;

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
