// A stand-in for libopapi.so: it decodes attention calls and hands them to a callback.
//
// torch_npu looks its kernels up here by name. Each aclnn operator is two functions: one that
// takes the arguments and returns an executor, and one that runs the executor. Here the first
// writes its arguments into a line of JSON, and the second gives that line to the callback,
// which computes on the very memory that the arguments point to.
//
// Operators that are not decoded are not defined, so torch_npu finds nothing and raises. A
// stand-in that answered every name with success would make a sum return zeros in silence.

#define _GNU_SOURCE
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"

enum { MAX_RANK = 16, ACLNN_ERR_INNER = 561000 };

// -- descriptions that torch_npu makes of its arguments ----------------------------------------

typedef struct {
    uint64_t rank;
    int64_t shape[MAX_RANK];
    int64_t stride[MAX_RANK];
    int64_t offset;  // in elements, from the start of the storage
    int dtype;       // an aclDataType
    void *storage;
} aclTensor;

typedef struct {
    uint64_t size;
    int64_t values[];
} aclIntArray;

aclTensor *aclCreateTensor(const int64_t *shape, uint64_t rank, int dtype, const int64_t *stride,
                           int64_t offset, int format, const int64_t *storage_shape,
                           uint64_t storage_rank, void *storage) {
    (void)format, (void)storage_shape, (void)storage_rank;
    aclTensor *tensor = rank <= MAX_RANK ? calloc(1, sizeof *tensor) : NULL;
    if (tensor == NULL) return NULL;
    tensor->rank = rank;
    memcpy(tensor->shape, shape, rank * sizeof *shape);
    if (stride != NULL) memcpy(tensor->stride, stride, rank * sizeof *stride);
    tensor->offset = offset;
    tensor->dtype = dtype;
    tensor->storage = storage;
    return tensor;
}

aclIntArray *aclCreateIntArray(const int64_t *values, uint64_t size) {
    aclIntArray *array = malloc(sizeof *array + size * sizeof *values);
    if (array == NULL) return NULL;
    array->size = size;
    if (size > 0) memcpy(array->values, values, size * sizeof *values);
    return array;
}

int aclDestroyTensor(void *tensor) { free(tensor); return 0; }
int aclDestroyIntArray(void *array) { free(array); return 0; }

// -- the record of one call, as JSON ----------------------------------------------------------

typedef struct {
    FILE *stream;
    char *text;
    size_t size;
} Record;

static void put_integers(FILE *out, const int64_t *values, uint64_t size) {
    fputc('[', out);
    for (uint64_t k = 0; k < size; k++) fprintf(out, "%s%" PRId64, k ? "," : "", values[k]);
    fputc(']', out);
}

static void put_T(FILE *out, const char *name, const aclTensor *tensor) {
    fprintf(out, ",\"%s\":", name);
    if (tensor == NULL) {
        fputs("null", out);
        return;
    }
    fputs("{\"shape\":", out);
    put_integers(out, tensor->shape, tensor->rank);
    fputs(",\"stride\":", out);
    put_integers(out, tensor->stride, tensor->rank);
    fprintf(out, ",\"offset\":%" PRId64 ",\"dtype\":%d,\"storage\":%" PRIuPTR "}",
            tensor->offset, tensor->dtype, (uintptr_t)tensor->storage);
}

static void put_A(FILE *out, const char *name, const aclIntArray *array) {
    fprintf(out, ",\"%s\":", name);
    if (array == NULL) fputs("null", out);
    else put_integers(out, array->values, array->size);
}

static void put_F(FILE *out, const char *name, double value) {
    fprintf(out, ",\"%s\":%.17g", name, value);
}

static void put_I(FILE *out, const char *name, int64_t value) {
    fprintf(out, ",\"%s\":%" PRId64, name, value);
}

static void put_S(FILE *out, const char *name, const char *value) {
    fprintf(out, ",\"%s\":\"%s\"", name, value != NULL ? value : "");
}

static Record *begin(const char *op) {
    Record *record = calloc(1, sizeof *record);
    if (record == NULL) return NULL;
    record->stream = open_memstream(&record->text, &record->size);
    if (record->stream == NULL) {
        free(record);
        return NULL;
    }
    fprintf(record->stream, "{\"op\":\"%s\"", op);
    return record;
}

static int end(Record *record, uint64_t *workspace_size, void **executor) {
    fputc('}', record->stream);
    fclose(record->stream);
    *workspace_size = 0;
    *executor = record;
    return 0;
}

// -- running it -------------------------------------------------------------------------------

typedef int (*Callback)(const char *json);

static Callback callback;

void rig_set_callback(Callback function) { callback = function; }

static int run(void *executor) {
    Record *record = executor;
    if (record == NULL) return ACLNN_ERR_INNER;
    int status = callback != NULL ? callback(record->text) : ACLNN_ERR_INNER;
    free(record->text);
    free(record);
    return status;
}

// -- the decoders -----------------------------------------------------------------------------

#define PARAMETER_T(name) const aclTensor *name,
#define PARAMETER_A(name) const aclIntArray *name,
#define PARAMETER_F(name) double name,
#define PARAMETER_I(name) int64_t name,
#define PARAMETER_S(name) const char *name,

#define RECORD_T(name) put_T(record->stream, #name, name);
#define RECORD_A(name) put_A(record->stream, #name, name);
#define RECORD_F(name) put_F(record->stream, #name, name);
#define RECORD_I(name) put_I(record->stream, #name, name);
#define RECORD_S(name) put_S(record->stream, #name, name);

#define DECODER(OP, CALL)                                                                     \
    int OP##GetWorkspaceSize(                                                                 \
        CALL(PARAMETER_T, PARAMETER_A, PARAMETER_F, PARAMETER_I, PARAMETER_S)                 \
        uint64_t *workspace_size, void **executor) {                                          \
        Record *record = begin(#OP);                                                          \
        if (record == NULL) return ACLNN_ERR_INNER;                                           \
        CALL(RECORD_T, RECORD_A, RECORD_F, RECORD_I, RECORD_S)                                \
        return end(record, workspace_size, executor);                                         \
    }                                                                                         \
    int OP(void *workspace, uint64_t size, void *executor, void *stream) {                    \
        (void)workspace, (void)size, (void)stream;                                            \
        return run(executor);                                                                 \
    }

DECODER(aclnnFlashAttentionScore, SCORE)
DECODER(aclnnFlashAttentionScoreV2, SCORE_V2)
DECODER(aclnnFlashAttentionScoreV3, SCORE_V3)
DECODER(aclnnFlashAttentionVarLenScore, VARLEN)
DECODER(aclnnFlashAttentionVarLenScoreV2, VARLEN_V2)
DECODER(aclnnFlashAttentionVarLenScoreV3, VARLEN_V3)
DECODER(aclnnFlashAttentionVarLenScoreV4, VARLEN_V4)
DECODER(aclnnFlashAttentionVarLenScoreV5, VARLEN_V5)

DECODER(aclnnFlashAttentionScoreGrad, GRAD)
DECODER(aclnnFlashAttentionScoreGradV2, GRAD_V2)
DECODER(aclnnFlashAttentionScoreGradV3, GRAD_V3)
DECODER(aclnnFlashAttentionUnpaddingScoreGrad, UNPADDING)
DECODER(aclnnFlashAttentionUnpaddingScoreGradV2, UNPADDING_V2)
DECODER(aclnnFlashAttentionUnpaddingScoreGradV3, UNPADDING_V3)
DECODER(aclnnFlashAttentionUnpaddingScoreGradV4, UNPADDING_V4)
DECODER(aclnnFlashAttentionUnpaddingScoreGradV5, UNPADDING_V5)

DECODER(aclnnBlockSparseAttention, BLOCK_SPARSE)
DECODER(aclnnBlockSparseAttentionGrad, BLOCK_SPARSE_GRAD)

DECODER(aclnnDropoutGenMaskV2, DROPOUT_BITS)
DECODER(aclnnDropoutGenMaskV2Tensor, DROPOUT_BITS_TENSOR)
