// The functions that the library offers. They return 0, -1 when there is not enough memory, -2 when
// a thread cannot be started; those below -2 are in comm.h.
#pragma once
#include "abi.h"
#include "comm.h"

#define QUIRE_API extern "C" __attribute__((visibility("default")))

// A hash of the sources that it was built from.
QUIRE_API const char* quire_sources();

// The instruction set in use.
QUIRE_API const char* quire_isa();

// Those that this CPU has, the best first, with spaces between.
QUIRE_API const char* quire_isas();

// Use this instruction set from now on, by all threads; -1 if it is unknown or not there.
QUIRE_API int quire_choose_isa(const char* name);

// Bring a weight [out, in] into blocks, in place; what is left over of the last goes to `tail`.
QUIRE_API int quire_pack(void* weight, int64_t out, int64_t in, int32_t dtype, void* tail,
                         int num_threads);

// Bring copies of several weights into blocks, on this thread alone.
QUIRE_API void quire_pack_copies(const quire::Packing* packings, int64_t count);

// Bring a weight in codes into blocks, or back.
QUIRE_API int quire_pack_codes(const quire::CodesPacking* packing, int num_threads);
QUIRE_API int quire_unpack_codes(const quire::CodesPacking* packing, int num_threads);

// Fill in what steps want to know of all matrices of a mixture.
QUIRE_API void quire_measure(quire::Mixture* mixture);

// Memory for the steps of one model; null when there is not enough.
QUIRE_API void* quire_context_new();
QUIRE_API void quire_context_free(void* context);

QUIRE_API int quire_forward(void* context, const quire::Model* model, const quire::Batch* batch,
                            int num_threads);

// Logits of `hidden` [num_rows][hidden_size]. Slots of adapters are as in Batch.
QUIRE_API int quire_logits(void* context, const quire::Model* model, const float* hidden,
                           int64_t num_rows, const int32_t* adapter_slots, float* out,
                           int num_threads);

// The likeliest token after each of some rows of `hidden`, and its logit. There is a slot for each
// of these rows.
QUIRE_API int quire_likeliest(void* context, const quire::Model* model, const float* hidden,
                              const int64_t* indices, int64_t num_rows,
                              const int32_t* adapter_slots, int64_t* ids, float* highest,
                              int num_threads);

// From here on: what Backend in quire/kernels/interface.py says of the operation of that name.
QUIRE_API int quire_argmax(void* context, const quire::Logits* logits, int64_t* ids,
                           float* highest, int num_threads);
QUIRE_API int quire_draw(void* context, const quire::Logits* logits, const quire::Draw* how,
                         int64_t* ids, int num_threads);
QUIRE_API int quire_top(void* context, const quire::Logits* logits, int64_t k, float* values,
                        int64_t* ids, int num_threads);
QUIRE_API int quire_log_probabilities(void* context, const quire::Logits* logits,
                                      const int64_t* targets, int64_t k, int64_t* ids,
                                      float* values, int64_t* ranks, int num_threads);
QUIRE_API void quire_penalize(float* logits, int64_t stride, const quire::Penalties* penalties);
QUIRE_API void quire_mask(float* logits, int64_t stride, int64_t vocab, const int64_t* rows,
                          int64_t num_masks, const uint32_t* words, int64_t num_words);

// From here on: what ranks of a model share. What memory it takes; what is to be called first, by one
// of them; and how the memory is divided, -1 if it is not what it should be.
QUIRE_API int64_t quire_shared_size(const quire::SharedSizes* sizes);
QUIRE_API void quire_shared_init(void* base, const quire::SharedSizes* sizes);
QUIRE_API int quire_shared_sizes(void* base, int64_t bytes, quire::SharedSizes* sizes);

// Say that a rank is lost: whoever waits for anybody ends, now and later.
QUIRE_API void quire_shared_fail(void* base, int32_t rank, const char* why);

// What went wrong, a CommStatus, with the rank (-1: not known) and the reason; 0: nothing did.
QUIRE_API int quire_shared_failure(void* base, int32_t* rank, char* why, int64_t size);

// The seat of a rank; null when there is not enough memory.
QUIRE_API void* quire_comm_new(void* base, int32_t rank, int32_t fd, double patience);
QUIRE_API void quire_comm_free(void* comm);
QUIRE_API void* quire_comm_base(void* comm);
QUIRE_API void quire_comm_counters(void* comm, quire::CommCounters* counters);
QUIRE_API int quire_comm_reduce(void* comm, float* data, int64_t count);
QUIRE_API int quire_comm_gather(void* comm, const void* data, int64_t bytes, void* out);
QUIRE_API int quire_comm_send(void* comm, const void* data, int64_t bytes);
QUIRE_API int quire_comm_receive(void* comm, void* data, int64_t bytes);
