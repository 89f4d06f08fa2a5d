//! How much arithmetic a model is.

use super::Config;

impl Config {
    /// Parameters that are multiplied with each token: the blocks' matrices and the head. A look-up
    /// in the embedding is no product; a tied one counts once, as the head.
    pub fn product_parameters(&self) -> u128 {
        let head = self.vocab_size as u128 * self.hidden_size as u128;
        self.block_matrix_parameters().saturating_add(head)
    }

    /// FLOPs of products a token of a forward pass over windows of `context` tokens: `2 N + 2 T h L`,
    /// with N the [product parameters](Self::product_parameters), T the context, h the width of all
    /// heads together and L the layers. Attention is causal: a token sees half the window.
    pub fn forward_flops(&self, context: usize) -> u128 {
        let heads = self.num_attention_heads as u128 * self.head_dim as u128;
        let attention =
            heads.saturating_mul(context as u128).saturating_mul(self.num_hidden_layers as u128);
        self.product_parameters().saturating_add(attention).saturating_mul(2)
    }

    /// FLOPs of products a token of a training step: forward, and twice as many backward. Recomputed
    /// work does not count; model FLOPs utilisation is this over the device's peak.
    pub fn training_flops(&self, context: usize) -> u128 {
        self.forward_flops(context).saturating_mul(3)
    }
}
