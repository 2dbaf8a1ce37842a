// GCC 12's own _tile_loadconfig tells the compiler that it reads 8 of the 64 bytes it is given, so
// the stores of the others are dropped as dead, and the first product on a processor with AMX ends
// in a general protection fault (SIGSEGV). The same instruction, with all it reads named.
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
typedef unsigned char edgedistill_tile_config[64];
static inline void edgedistill_tile_loadconfig(const void * config) {
    __asm__ volatile("ldtilecfg\t%X0" : : "m"(*static_cast<const edgedistill_tile_config *>(config)));
}
#define _tile_loadconfig edgedistill_tile_loadconfig
#endif
