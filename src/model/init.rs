//! The weights a model starts from.

use super::{Config, Layout, ParamKind};
use crate::random::{Philox, Stream};

/// An arena of initial weights, as transformers initializes a Llama: matrices, embedding and head
/// normal(0, `initializer_range`), norms 1, and the embedding of the pad token 0.
///
/// A parameter's values depend on the seed, its place in the list and its own shape alone, not on
/// the sizes of the others.
pub fn initialize(config: &Config, layout: &Layout, seed: u64) -> Vec<f32> {
    let mut weights = vec![0.0; layout.len];
    let random = Philox::new(seed, Stream::Init);
    for (place, parameter) in layout.parameters.iter().enumerate() {
        let values = &mut weights[parameter.span.range()];
        match parameter.kind {
            ParamKind::Norm => values.fill(1.0),
            ParamKind::Embedding | ParamKind::Head | ParamKind::Matrix => {
                random.fill_normal(place as u32, config.initializer_range, values);
            }
        }
        if let (ParamKind::Embedding, Some(pad)) = (parameter.kind, config.pad_token_id) {
            let start = pad as usize * config.hidden_size;
            values[start..start + config.hidden_size].fill(0.0);
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::original;

    fn small() -> Config {
        Config { vocab_size: 1001, num_hidden_layers: 2, ..original() }
    }

    #[test]
    fn init_matches_transformers_distribution() {
        // An odd hidden size leaves gaps between the groups.
        let config = Config { hidden_size: 63, ..small() };
        let layout = Layout::new(&config);
        let weights = initialize(&config, &layout, 1);
        let mut gaps = weights.clone();
        for parameter in &layout.parameters {
            let values = &weights[parameter.span.range()];
            gaps[parameter.span.range()].fill(0.0);
            if parameter.kind == ParamKind::Norm {
                assert!(values.iter().all(|&value| value == 1.0));
                continue;
            }
            let n = values.len() as f64;
            let deviation = (values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n).sqrt();
            // Five standard errors; the pad row takes 1 of 1001 rows away.
            let bound = 5.0 / (2.0 * n).sqrt() + 1e-3;
            assert!((deviation / 0.02 - 1.0).abs() < bound, "{}: {deviation}", parameter.name);
        }
        assert!(gaps.iter().all(|&value| value == 0.0));
        let pad = layout.embedding.offset + 4 * 63;
        assert!(weights[pad..pad + 63].iter().all(|&value| value == 0.0));
        assert!(weights[pad + 63..pad + 126].iter().all(|&value| value != 0.0));
        let head = layout.head.offset + 4 * 63;
        assert!(weights[head..head + 63].iter().all(|&value| value != 0.0), "the head has no pad");
    }

    #[test]
    fn init_depends_on_seed_and_own_shape_only() {
        let config = small();
        let layout = Layout::new(&config);
        let weights = initialize(&config, &layout, 1);
        assert_eq!(weights, initialize(&config, &layout, 1));
        assert_ne!(weights, initialize(&config, &layout, 2));

        let wider = Config { vocab_size: 1300, intermediate_size: 300, ..small() };
        let wider_layout = Layout::new(&wider);
        let wider_weights = initialize(&wider, &wider_layout, 1);
        let (q, wider_q) = (layout.blocks[1].qkv, wider_layout.blocks[1].qkv);
        assert_ne!(q.offset, wider_q.offset);
        assert_eq!(weights[q.range()], wider_weights[wider_q.range()]);
    }

    #[test]
    fn init_streams_are_distinct() {
        let config = small();
        let layout = Layout::new(&config);
        let weights = initialize(&config, &layout, 1);
        let mut starts: Vec<_> = layout
            .parameters
            .iter()
            .filter(|parameter| parameter.kind != ParamKind::Norm)
            .map(|parameter| weights[parameter.span.offset].to_bits())
            .collect();
        let count = starts.len();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), count);
    }
}
