// The C interface of libada2i_cpu: no torch, no C++ types. Python fills one structure per call and owns every array in it.
#pragma once
#include <stdint.h>

enum { ADA2I_FLOAT32, ADA2I_FLOAT64, ADA2I_BFLOAT16, ADA2I_FLOAT16, ADA2I_DTYPES };

struct TensorRing {
  int64_t dtype, threads, modalities, rows, dialogues, rank, gated_target;
  int64_t parameters;       // the dtype of weights and biases and of their gradients: that of the rest, or float for 16 bits
  double scale, beta, dropout;
  const int64_t* widths;    // [M]
  const int64_t* ring;      // [M][M - 1]
  const int64_t* offsets;   // [B + 1]
  const int64_t* seed;      // [1], or null without dropout
  const double* coefficient;   // [M] of attention_mapping over the same x with this op's target, or null without it
  void* loss;               // its result, in backward the gradient of that. float, double for ADA2I_FLOAT64
  // Lists of M arrays, one after the other; contiguous, of the storage type; proj [N, 4R] and A [B, R, R]
  // float, or double for ADA2I_FLOAT64. proj_weight [R, D] and proj_bias [R] of q1, q2, k1, k2: lists of 4M arrays, theirs of modality 0
  // first; their gradients are stacked, [4R, D] and [4R]. In brackets what attention_mapping adds: of int8, signs [N, D], and behind them of each
  // row ceil(D / 64) * 8 bytes, what dropout has kept.
  //   forward   x proj_weight proj_bias map_weight map_bias
  //             | out target(null: none) proj A attention (null, all three: none) [phi phi_bias | sign]
  //   backward  x proj_weight map_weight proj A attention grad_out grad_target(null: 0)
  //             | grad_x grad_proj_weight grad_proj_bias grad_map_weight grad_map_bias [phi sign | grad_phi grad_phi_bias]
  void* const* tensors;
};

struct AttentionMapping {
  int64_t dtype, threads, modalities, rows;
  const int64_t* widths;
  const double* coefficient;   // [M]
  void* loss;                  // in backward: its gradient. float, double for ADA2I_FLOAT64
  //   forward   x target weight bias | sign
  //   backward  x sign weight | grad_x grad_target grad_weight grad_bias
  void* const* tensors;
};

struct CosineFusion {
  int64_t dtype, threads, modalities, rows, width, classes;
  int64_t amw, over_classes, linear_scores;   // options: cosines or a linear map; axis of |W|; what the scores come from
  double scale;
  const int64_t* labels;    // [N], or null
  int64_t* outside;         // the first label that is no class, or -1
  // weight [C, M D]; float, or double for ADA2I_FLOAT64, are log_prob norm scores ratio
  //   forward   hidden (M) weight bias(null: none) | joint log_prob norm scores ratio (both null without labels)
  //   backward  hidden (M) weight grad_joint norm | grad_hidden (M) grad_weight grad_bias(null: none)
  void* const* tensors;
};

// x, grad_x and, of relu_dropout, out and grad_out are of the storage type; all the rest is float.
struct DropoutFused {
  int64_t dtype, threads, rows, width, stream;
  double dropout, eps;
  const int64_t* seed;      // [1], or null without dropout
  //   relu_dropout_forward   x bias | out
  //   relu_dropout_backward  grad_out out | grad_x grad_bias
  //   dropout_norm_forward   x bias residual weight norm_bias | out mean rstd
  //   dropout_norm_backward  x bias residual weight mean rstd grad_out | grad_x grad_bias grad_residual grad_weight grad_norm_bias
  void* const* tensors;
};

// y = x W^T + b. x and grad_x [rows, inputs], y and grad_out [rows, outputs] are of the storage type, the parameters and their gradients float.
struct Linear {
  int64_t dtype, threads, rows, inputs, outputs, relu, stream;
  double dropout;           // forward: relu and dropout as in DropoutFused's relu_dropout; its seed
  const int64_t* seed;
  //   forward   x weight bias(null: none) | y
  //   input     grad_out weight added(null: none; may be grad_x) | grad_x
  //   backward  grad_out x | grad_weight grad_bias(null: none)
  void* const* tensors;
};

// All of the storage type but logsum, float [N][heads][2]: of a row's scores the maximum m, and log sum exp(S - m).
struct DialogueAttention {
  int64_t dtype, threads, heads, width, dialogues, stream;
  double scale, dropout;
  const int64_t* offsets;   // [B + 1]
  const int64_t* seed;      // [1], or null without dropout
  //   forward   qkv | out logsum
  //   backward  qkv out logsum grad_out | grad_qkv
  void* const* tensors;
};

// float32.
struct BalancedAdam {
  int64_t threads, count;
  double beta1, beta2, eps;
  const int64_t* seed;      // [2] seed and step, or null without noise
  const int64_t* sizes;     // [T] elements
  const int64_t* numbers;   // [T] the tensors' numbers in the counter of the noise
  const double* settings;   // [T][6] factor of the gradient, weight decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), noise on g, on theta
  double* measures;         // [T][2] mean, sum of squared deviations
  //   measure   gradients
  //   update    parameters gradients exp_avg exp_avg_sq
  //   noise     out
  void* const* tensors;
};

// One set of entry points per tier and dtype, pointers all. They return 0, or 1 where memory ran out. Null: as in the tier below.
struct Ada2iTier {
  const char* name;
  int (*tensor_ring_forward[2][ADA2I_DTYPES])(const TensorRing*);    // the second row: with parameters in float
  int (*tensor_ring_backward[2][ADA2I_DTYPES])(const TensorRing*);
  int (*attention_mapping_forward[ADA2I_DTYPES])(const AttentionMapping*);
  int (*attention_mapping_backward[ADA2I_DTYPES])(const AttentionMapping*);
  int (*cosine_fusion_forward[ADA2I_DTYPES])(const CosineFusion*);
  int (*cosine_fusion_backward[ADA2I_DTYPES])(const CosineFusion*);
  // None for ADA2I_FLOAT64.
  int (*relu_dropout_forward[ADA2I_DTYPES])(const DropoutFused*);
  int (*relu_dropout_backward[ADA2I_DTYPES])(const DropoutFused*);
  int (*dropout_norm_forward[ADA2I_DTYPES])(const DropoutFused*);
  int (*dropout_norm_backward[ADA2I_DTYPES])(const DropoutFused*);
  int (*dialogue_attention_forward[ADA2I_DTYPES])(const DialogueAttention*);
  int (*dialogue_attention_backward[ADA2I_DTYPES])(const DialogueAttention*);
  int (*linear_forward[ADA2I_DTYPES])(const Linear*);
  int (*linear_input[ADA2I_DTYPES])(const Linear*);
  int (*linear_backward[ADA2I_DTYPES])(const Linear*);
  int (*balanced_adam_measure)(const BalancedAdam*);
  int (*balanced_adam_update)(const BalancedAdam*);
  int (*balanced_adam_modulate)(const BalancedAdam*);
  int (*balanced_adam_noise)(const BalancedAdam*);
};
