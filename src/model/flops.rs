//! FLOPs of a model.

use super::Config;

impl Config {
    /// Parameters in matmuls: the blocks' matrices and the LM head. The embedding look-up does not
    /// count; a tied matrix counts once, as the head.
    pub fn matmul_parameters(&self) -> u128 {
        let head = self.vocab_size as u128 * self.hidden_size as u128;
        self.block_matrix_parameters().saturating_add(head)
    }

    /// FLOPs of matmuls per token of a forward pass over windows of `context` tokens: `2 N + 2 T h L`,
    /// with N the [matmul parameters](Self::matmul_parameters), T the context, h the width of all
    /// heads together and L the layers. Attention is causal: a token sees half the window.
    pub fn forward_flops(&self, context: usize) -> u128 {
        let heads = self.num_attention_heads as u128 * self.head_dim as u128;
        let attention =
            heads.saturating_mul(context as u128).saturating_mul(self.num_hidden_layers as u128);
        self.matmul_parameters().saturating_add(attention).saturating_mul(2)
    }

    /// FLOPs of matmuls per token of a training step: forward, and twice as many backward. Recomputed
    /// work does not count; model FLOPs utilization is this over the device's peak.
    pub fn training_flops(&self, context: usize) -> u128 {
        self.forward_flops(context).saturating_mul(3)
    }
}
