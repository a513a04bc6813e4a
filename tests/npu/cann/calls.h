// The aclnn calls that the stand-in understands, one line of arguments each.
//
// A call is a macro over five kinds of argument, in the order of its C signature:
//   T(tensor)  A(list of integers)  F(double)  I(int64)  S(string)
// opapi.c expands it twice: to the parameter list, and to the code that records each argument
// under its name. Names are those of attnkit's KernelCall where it has one.
//
// A new decoder is one macro here and one DECODER line in opapi.c.

#define QKV(T) T(query) T(key) T(value)
#define QKV_ROPE(T) T(query) T(query_rope) T(key) T(key_rope) T(value)
#define MASKS(T) T(pse) T(dropout_mask) T(padding_mask) T(atten_mask)
#define LENGTHS(A) A(actual_seq_qlen) A(actual_seq_kvlen)
#define STARTS(A) A(q_start_idx) A(kv_start_idx)
#define NUMBERS(F, I, S)                                                                      \
    F(scale) F(keep_prob) I(pre_tokens) I(next_tokens) I(head_num) S(input_layout)            \
    I(inner_precise) I(sparse_mode)
#define RESULTS(T) T(softmax_max) T(softmax_sum) T(softmax_out) T(attention_out)
#define STATISTICS(T) T(softmax_max) T(softmax_sum) T(softmax_in) T(attention_in)
#define GRADIENTS(T) T(dq) T(dk) T(dv) T(dpse)
#define GRADIENTS_ROPE(T) T(dq) T(dq_rope) T(dk) T(dk_rope) T(dv) T(dpse)

// -- forward, dense and packed ----------------------------------------------------------------

#define SCORE(T, A, F, I, S) QKV(T) MASKS(T) A(prefix) NUMBERS(F, I, S) RESULTS(T)
#define SCORE_V2(T, A, F, I, S)                                                               \
    QKV(T) MASKS(T) A(prefix) STARTS(A) NUMBERS(F, I, S) I(pse_type) RESULTS(T)
#define SCORE_V3(T, A, F, I, S)                                                               \
    QKV(T) MASKS(T) T(sink) A(prefix) STARTS(A) NUMBERS(F, I, S) I(pse_type) RESULTS(T)

#define VARLEN(T, A, F, I, S)                                                                 \
    QKV(T) MASKS(T) A(prefix) LENGTHS(A) NUMBERS(F, I, S) RESULTS(T)
#define VARLEN_V2(T, A, F, I, S)                                                              \
    QKV(T) MASKS(T) A(prefix) LENGTHS(A) STARTS(A) NUMBERS(F, I, S) I(pse_type) RESULTS(T)
#define VARLEN_V3(T, A, F, I, S)                                                              \
    QKV_ROPE(T) MASKS(T) A(prefix) LENGTHS(A) STARTS(A) NUMBERS(F, I, S) I(pse_type)          \
    RESULTS(T)
#define VARLEN_V4(T, A, F, I, S)                                                              \
    QKV(T) MASKS(T) A(prefix) LENGTHS(A) NUMBERS(F, I, S) S(softmax_layout) RESULTS(T)
#define VARLEN_V5(T, A, F, I, S)                                                              \
    QKV_ROPE(T) MASKS(T) T(sink) A(prefix) LENGTHS(A) STARTS(A) NUMBERS(F, I, S) I(pse_type)  \
    S(softmax_layout) RESULTS(T)

// -- backward, dense and packed ---------------------------------------------------------------

#define GRAD(T, A, F, I, S)                                                                   \
    QKV(T) T(dy) MASKS(T) STATISTICS(T) A(prefix) NUMBERS(F, I, S) GRADIENTS(T)
#define GRAD_V2(T, A, F, I, S)                                                                \
    QKV(T) T(dy) MASKS(T) STATISTICS(T) A(prefix) STARTS(A) NUMBERS(F, I, S) I(pse_type)      \
    GRADIENTS(T)
#define GRAD_V3(T, A, F, I, S)                                                                \
    QKV(T) T(dy) MASKS(T) STATISTICS(T) T(sink) A(prefix) STARTS(A) NUMBERS(F, I, S)          \
    I(pse_type) GRADIENTS(T) T(dsink)

#define UNPADDING(T, A, F, I, S)                                                              \
    QKV(T) T(dy) MASKS(T) STATISTICS(T) A(prefix) LENGTHS(A) NUMBERS(F, I, S) GRADIENTS(T)
#define UNPADDING_V2(T, A, F, I, S)                                                           \
    QKV(T) T(dy) MASKS(T) STATISTICS(T) A(prefix) LENGTHS(A) STARTS(A) NUMBERS(F, I, S)       \
    I(pse_type) GRADIENTS(T)
#define UNPADDING_V3(T, A, F, I, S)                                                           \
    QKV_ROPE(T) T(dy) MASKS(T) STATISTICS(T) A(prefix) LENGTHS(A) STARTS(A) NUMBERS(F, I, S)  \
    I(pse_type) GRADIENTS_ROPE(T)
#define UNPADDING_V4(T, A, F, I, S)                                                           \
    QKV(T) T(dy) MASKS(T) STATISTICS(T) A(prefix) LENGTHS(A) NUMBERS(F, I, S) GRADIENTS(T)    \
    S(softmax_layout)
#define UNPADDING_V5(T, A, F, I, S)                                                           \
    QKV_ROPE(T) T(dy) MASKS(T) STATISTICS(T) T(sink) A(prefix) LENGTHS(A) STARTS(A)           \
    NUMBERS(F, I, S) I(pse_type) S(softmax_layout) GRADIENTS_ROPE(T) T(dsink)

// -- in blocks, forward and backward -----------------------------------------------------------

#define BLOCK_LENGTHS(A) A(block_shape) A(actual_seq_lengths) A(actual_seq_lengths_kv)
#define BLOCK_LAYOUT(S, I) S(q_input_layout) S(kv_input_layout) I(num_key_value_heads) I(mask_type)
#define BLOCK_SPARSE(T, A, F, I, S)                                                           \
    QKV(T) T(block_sparse_mask) T(atten_mask) BLOCK_LENGTHS(A) T(block_table)                 \
    BLOCK_LAYOUT(S, I) F(scale_value) I(inner_precise) I(block_size) I(pre_tokens)            \
    I(next_tokens) I(softmax_lse_flag) T(attention_out) T(softmax_lse)
#define BLOCK_SPARSE_GRAD(T, A, F, I, S)                                                      \
    T(d_out) QKV(T) T(attention_out) T(softmax_lse) T(block_sparse_mask) T(atten_mask)        \
    BLOCK_LENGTHS(A) BLOCK_LAYOUT(S, I) F(scale_value) I(pre_tokens) I(next_tokens)           \
    T(dq) T(dk) T(dv)

// -- dropout ----------------------------------------------------------------------------------

#define DROPOUT_BITS(T, A, F, I, S)                                                           \
    A(shape) F(drop_prob) I(seed) I(offset) I(prob_dtype) T(out)
// The variant of op version 3: seed and offset are tensors, `shift` is added to the offset.
#define DROPOUT_BITS_TENSOR(T, A, F, I, S)                                                    \
    A(shape) F(drop_prob) T(seed) T(offset) I(shift) I(prob_dtype) T(out)
