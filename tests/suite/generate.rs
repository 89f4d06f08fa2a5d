//! Generation: against PyTorch, in batches of any composition, and to the bytes that were learned.

use laam::backend::cpu::Cpu;
use laam::backend::reference::Reference;
use laam::backend::{Arena, Backend, DecodeShape, Inputs, Session, SessionSpec};
use laam::generate::{FinishReason, Generator, Request, Sampling};
use laam::llama::{Program, step};
use laam::model::{Config, Layout};
use laam::random::{Philox, Stream};
use serde_json::{Value, json};

use crate::backend::config;
use crate::trainer;

fn fixture() -> Value {
    let text = include_str!("../fixtures/greedy.json");
    serde_json::from_str(text).expect("the fixture is JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("ids");
    ids.iter().map(|id| id.as_u64().expect("a number") as u32).collect()
}

#[test]
fn rows_beyond_the_tokenizer_are_never_chosen() {
    let config = Config { vocab_size: 64, ..config(2, 1, 4, false) };
    let layout = Layout::new(&config);
    let weights = laam::model::initialize(&config, &layout, 3);
    let request = |sequence| Request {
        prompt: vec![sequence, 1],
        max_new_tokens: 12,
        sampling: Sampling { temperature: 50.0, seed: 5, ..Sampling::default() },
        sequence,
        ..Request::default()
    };
    let backend = Cpu::f32(1);
    let largest = |tokens: usize| -> u32 {
        let generator = Generator::new(&backend, &config, &weights, 2, 32).unwrap();
        let answers = generator.with_tokens(tokens).all((0..4).map(request).collect()).unwrap();
        answers.iter().flat_map(|answer| answer.ids.clone()).max().expect("there are tokens")
    };
    assert!(largest(64) >= 50, "all rows can be chosen");
    assert!((20..50).contains(&largest(50)));
}

#[test]
fn logits_match_transformers() {
    let case = fixture();
    let (config, layout) = (trainer::config(&case), Layout::new(&trainer::config(&case)));
    let batch = trainer::windows(&case, &json!([0, 1]));
    for backend in [&Reference::F32 as &dyn Backend, &Cpu::f32(2)] {
        for row in case["logits"].as_array().expect("rows") {
            let number = |name: &str| row[name].as_u64().expect("a number") as usize;
            let (window, column) = (number("window"), number("column"));
            // Rotary embedding is relative: without its padding a window starts at position 0.
            let pads = case["left_pads"][window].as_u64().expect("a number") as usize;
            let ids = &batch.ids[window * batch.context..][pads..=column];
            let decoding = step::decoding(&config, &layout, 1, ids.len(), ids.len());
            let spec = SessionSpec { cache_len: decoding.cache_len, ..SessionSpec::default() };
            let mut session = backend.open(&layout, spec).unwrap();
            let weights = trainer::weights(&case, &config, &layout);
            session.write(Arena::Parameters, &weights).unwrap();
            let program = session.load(decoding.program).unwrap();
            let last = [ids.len() as u32 - 1];
            let indices = vec![
                (decoding.ids, ids),
                (decoding.start, [0].as_slice()),
                (decoding.position, last.as_slice()),
            ];
            session.run(program, &Inputs { indices, ..Inputs::default() }).unwrap();
            let ours = session.floats(program, decoding.logits).unwrap();
            let theirs = row["logits"].as_array().expect("logits");
            assert_eq!(ours.len(), theirs.len());
            for (id, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                let off = (f64::from(*ours) - theirs.as_f64().expect("a logit")).abs();
                assert!(off < 1e-4, "{}, window {window}, token {id}: {off}", backend.name());
            }
        }
    }
}

#[test]
fn greedy_tokens_match_transformers() {
    let case = fixture();
    let (config, layout) = (trainer::config(&case), Layout::new(&trainer::config(&case)));
    let weights = trainer::weights(&case, &config, &layout);
    for backend in [&Reference::F32 as &dyn Backend, &Cpu::f32(2)] {
        let mut generator = Generator::new(backend, &config, &weights, 1, 256).unwrap();
        let request =
            Request { prompt: ids(&case["prompt_ids"]), max_new_tokens: 200, ..Request::default() };
        let answers = generator.all(vec![request]).unwrap();
        assert_eq!(answers[0].ids, ids(&case["ids"]), "{}", backend.name());
        assert_eq!(answers[0].finish, FinishReason::Length);
    }
}

/// Weights with which what comes next depends on everything before it.
pub fn lively(config: &Config, seed: u64) -> Vec<f32> {
    let layout = Layout::new(config);
    let mut arena = vec![0.0; layout.len];
    for (sequence, parameter) in layout.parameters.iter().enumerate() {
        let deviation = if parameter.span.rows == 1 { 1.0 } else { 0.5 };
        let place = &mut arena[parameter.span.range()];
        Philox::new(seed, Stream::Test).fill_normal(sequence as u32, deviation, place);
    }
    arena
}

/// Prompts of 1 to 90 tokens; every other request draws, the others are greedy.
fn requests(config: &Config, count: usize) -> Vec<Request> {
    let random = Philox::new(2, Stream::Test);
    let request = |at: usize| {
        let draw = |counter: u64, n: usize| random.at(at as u32, counter)[0] as usize % n;
        let length = if at.is_multiple_of(3) { 1 + draw(1000, 90) } else { 1 + draw(1000, 9) };
        Request {
            prompt: (0..length).map(|c| draw(c as u64, config.vocab_size) as u32).collect(),
            max_new_tokens: 20 + draw(1001, 60),
            stop: (0..5).map(|c| draw(1002 + c, config.vocab_size) as u32).collect(),
            sampling: Sampling { temperature: (at % 2) as f64, seed: 5, ..Sampling::default() },
            sequence: at as u32,
        }
    };
    (0..count).map(request).collect()
}

#[test]
fn sequence_is_bitwise_equal_alone_and_in_a_batch() {
    let config = Config { max_position_embeddings: 96, ..config(18, 3, 2, false) };
    let weights = lively(&config, 8);
    let mut requests = requests(&config, 24);
    let run = |slots: usize, threads: usize, requests: &[Request]| {
        let backend = Cpu::f32(threads);
        let mut generator = Generator::new(&backend, &config, &weights, slots, 96).unwrap();
        generator.all(requests.to_vec()).unwrap()
    };
    let alone = run(1, 1, &requests);
    let ended = |finish| alone.iter().filter(|answer| answer.finish == finish).count();
    for finish in [FinishReason::Stop, FinishReason::Length, FinishReason::Context] {
        assert!(ended(finish) > 0, "{finish:?} is part of the test");
    }
    for slots in [2, 5, 16, 40, 64] {
        assert!(run(slots, 2, &requests) == alone, "{slots} slots");
    }
    // In another order, beside other neighbors.
    requests.reverse();
    let mut backwards = run(7, 2, &requests);
    backwards.reverse();
    assert!(backwards == alone, "another order");
}

/// The reference backend with the decode steps of a GPU, on a small scale, and so much memory.
struct ManySlots {
    memory: u64,
}

impl Backend for ManySlots {
    fn name(&self) -> &'static str {
        Reference::F32.name()
    }

    fn device(&self) -> String {
        Reference::F32.device()
    }

    fn open(&self, layout: &Layout, spec: SessionSpec) -> anyhow::Result<Box<dyn Session>> {
        Reference::F32.open(layout, spec)
    }

    fn micro_batch(&self, batch: usize, seq_len: usize) -> usize {
        Reference::F32.micro_batch(batch, seq_len)
    }

    fn workspace_bytes(&self, programs: &[&Program]) -> usize {
        Reference::F32.workspace_bytes(programs)
    }

    fn memory(&self) -> Option<u64> {
        Some(self.memory)
    }

    fn decode_shape(&self) -> DecodeShape {
        DecodeShape { slots: 80, spare_slots: 80, prompt_tokens: 4 }
    }
}

#[test]
fn many_slots_generate_the_tokens_of_one() {
    let config = Config { max_position_embeddings: 96, ..config(6, 2, 6, true) };
    let weights = lively(&config, 8);
    let requests = requests(&config, 90);
    let run = |slots: usize| {
        let backend = ManySlots { memory: 1 << 30 };
        let mut generator = Generator::new(&backend, &config, &weights, slots, 96).unwrap();
        assert_eq!(generator.free(), slots);
        generator.all(requests.clone()).unwrap()
    };
    assert!(run(80) == run(1));
}

#[test]
fn slots_are_limited_by_cache_and_logits() {
    let small = config(6, 2, 6, true);
    let slots = |config: &Config, memory: u64, asked: usize| {
        let weights = vec![0.0; Layout::new(config).len];
        Generator::new(&ManySlots { memory }, config, &weights, asked, 16).unwrap().free()
    };
    let token_bytes = 8 * small.num_hidden_layers * small.num_key_value_heads * small.head_dim;
    // A quarter of the memory holds 10 sequences of 16 tokens and the 16 that a step writes.
    let memory = 4 * 10 * (16 + 16) * token_bytes as u64;
    assert_eq!(slots(&small, memory, 80), 10);
    assert_eq!(slots(&small, memory - 1, 80), 9);
    assert_eq!(slots(&small, memory, 3), 3);
    assert_eq!(slots(&small, 0, 80), 1);
    let wide = Config { vocab_size: 1 << 20, hidden_size: 4, ..small };
    assert_eq!(slots(&wide, 1 << 40, 80), 4);
}

#[test]
fn cancelled_sequence_frees_its_slot_without_a_trace() {
    let config = Config { max_position_embeddings: 96, ..config(18, 3, 2, false) };
    let weights = lively(&config, 8);
    let request = |start: u32| Request {
        prompt: (start..start + 8).collect(),
        max_new_tokens: 40,
        ..Request::default()
    };
    let backend = Cpu::f32(1);
    let mut alone = Generator::new(&backend, &config, &weights, 1, 96).unwrap();
    let expected = alone.all(vec![request(1), request(2)]).unwrap();
    let mut generator = Generator::new(&backend, &config, &weights, 2, 96).unwrap();
    let cancelled = generator.admit(request(0)).unwrap();
    let mut tickets = vec![generator.admit(request(1)).unwrap()];
    let mut ids = [Vec::new(), Vec::new()];
    for step in 0.. {
        if step == 20 {
            generator.cancel(cancelled);
            generator.cancel(cancelled);
            assert_eq!(generator.free(), 1);
            tickets.push(generator.admit(request(2)).unwrap());
        }
        for event in generator.step().unwrap() {
            if let Some(at) = tickets.iter().position(|&ticket| ticket == event.ticket) {
                ids[at].push(event.id);
            } else {
                assert!(step < 20, "a token of a cancelled sequence");
            }
        }
        if !generator.is_busy() {
            break;
        }
    }
    assert_eq!(ids[0], expected[0].ids);
    assert_eq!(ids[1], expected[1].ids);
}

#[test]
fn backends_generate_equal_tokens() {
    let config = Config { max_position_embeddings: 128, ..config(6, 2, 6, true) };
    let weights = lively(&config, 8);
    let requests = requests(&config, 3);
    let run = |backend: &dyn Backend| {
        Generator::new(backend, &config, &weights, 2, 128).unwrap().all(requests.clone()).unwrap()
    };
    assert_eq!(run(&Cpu::f32(2)), run(&Reference::F64));
}

#[test]
fn generation_rejects_invalid_prompts() {
    let config = config(6, 2, 6, true);
    let weights = lively(&config, 8);
    let backend = Cpu::f32(1);
    let mut generator = Generator::new(&backend, &config, &weights, 1, 16).unwrap();
    let good = Request { prompt: vec![1; 16], max_new_tokens: 5, ..Request::default() };
    for bad in [
        Request { prompt: vec![], ..good.clone() },
        Request { prompt: vec![1; 17], ..good.clone() },
        Request { prompt: vec![config.vocab_size as u32], ..good.clone() },
        Request { max_new_tokens: 0, ..good.clone() },
        Request {
            sampling: Sampling { temperature: f64::NAN, ..Sampling::default() },
            ..good.clone()
        },
    ] {
        let error = generator.admit(bad).unwrap_err();
        assert!(laam::error::hint_of(&error).is_some(), "{error:#}");
    }
    assert!(!generator.is_busy());
    // A full context leaves room for one token.
    let answers = generator.all(vec![good.clone()]).unwrap();
    assert_eq!((answers[0].ids.len(), answers[0].finish), (1, FinishReason::Context));
    // Weights that are no numbers end in an error, and the generator lives on.
    let mut broken = weights.clone();
    broken[Layout::new(&config).final_norm.offset] = f32::NAN;
    let mut generator = Generator::new(&backend, &config, &broken, 1, 16).unwrap();
    assert!(generator.all(vec![good]).is_err());
    assert!(!generator.is_busy());
    // A cache beyond all memory.
    let endless = Config { max_position_embeddings: 1 << 31, ..config };
    assert!(Generator::new(&backend, &endless, &weights, 16, usize::MAX).is_err());
}
