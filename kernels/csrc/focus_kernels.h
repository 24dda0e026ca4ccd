/* C ABI of the native operators. No PyTorch, no C++ types: any language with a C interface can call.
 *
 * Thread safety: a prepared codebook is immutable, any number of threads may look up in it at once.
 * Nothing throws across this boundary; failures are return codes. */
#ifndef FOCUS_KERNELS_H
#define FOCUS_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FOCUS_ABI_VERSION 1

typedef struct focus_codebook focus_codebook;

enum focus_isa {
  FOCUS_ISA_AUTO = 0,
  FOCUS_ISA_SCALAR = 1,
  FOCUS_ISA_AVX2 = 2,
  FOCUS_ISA_AVX512 = 3,
  FOCUS_ISA_VNNI = 4
};

enum focus_status {
  FOCUS_OK = 0,
  FOCUS_BAD_ARGUMENT = 1,
  FOCUS_NO_MEMORY = 2,
  FOCUS_ISA_MISSING = 3
};

int focus_abi_version(void);

/* The fastest instruction set of this machine, a value of focus_isa. */
int focus_best_isa(void);

/* Copy and rearrange `num_codes` x `dim` row-major codes. NULL: bad sizes or no memory. */
focus_codebook* focus_codebook_prepare(const float* codes, int64_t num_codes, int32_t dim);

void focus_codebook_free(focus_codebook* book);

/* Bytes that a prepared codebook holds. */
int64_t focus_codebook_bytes(const focus_codebook* book);

/* index[n] = argmin_k |tokens[n] - code[k]|^2 in fp64 arithmetic, lowest k on ties;
 * distance[n] is the minimum. A token that is not finite, or any token when a code is not finite,
 * gives (-1, NaN). `num_threads` < 1 means one. Returns a focus_status. */
int focus_codebook_lookup(const focus_codebook* book, const float* tokens, int64_t num_tokens,
                          int64_t* index, float* distance, int num_threads, int isa);

#ifdef __cplusplus
}
#endif
#endif
