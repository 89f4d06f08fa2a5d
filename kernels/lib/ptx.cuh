// Every PTX instruction that C++ has no word for, each behind one named function.
#pragma once
#include <cstdint>

// 2^x in one instruction: 2 ulp off at most, 0 for a result below 2^-126.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
