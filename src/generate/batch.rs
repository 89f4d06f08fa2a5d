//! Continuous batching: requests take free slots, and each step brings every running sequence one
//! token further, whatever the others are at.
//!
//! A sequence's tokens do not depend on the sequences beside it: on the `cpu` and `reference`
//! backends its logits are the same bits alone and in any company, and a draw is named by seed,
//! sequence and position.

use super::Sampling;
use crate::backend::{Arena, Backend, Inputs, ProgramId, Session, SessionSpec};
use crate::error;
use crate::llama::Buffer;
use crate::llama::step::{self, Decoding};
use crate::model::{Config, Layout};

/// Rows of a step: what the `cpu` backend computes in the same bits for any number of them.
const MAX_STEP_ROWS: usize = 64;
/// A cache of more bytes is refused.
const MAX_KV_CACHE_BYTES: usize = 8 << 30;

/// What is asked of a model.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// What the sequence begins with: a token at least.
    pub prompt: Vec<u32>,
    /// The sequence ends after so many tokens of its own,
    pub max_new_tokens: usize,
    /// or with one of these, which is its last.
    pub stop: Vec<u32>,
    pub sampling: Sampling,
    /// Sequences of one seed that have different numbers draw differently.
    pub sequence: u32,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// With a token it was to stop at.
    Stop,
    /// With as many tokens as were asked for.
    Length,
    /// The model reads no more tokens.
    Context,
}

/// A new token of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    /// The sequence: what [`Generator::admit`] said.
    pub ticket: u64,
    pub id: u32,
    /// Set with the last token.
    pub finish: Option<FinishReason>,
}

/// The tokens of one request's own, and why there are no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    pub ids: Vec<u32>,
    pub finish: FinishReason,
}

/// A model ready to generate.
pub struct Generator {
    session: Box<dyn Session>,
    vocab_size: usize,
    /// The most tokens of a sequence that the model reads. One more can follow them.
    columns: usize,
    slots: Vec<Option<Running>>,
    one: DecodeStep,
    /// Takes several tokens of each sequence: for prompts.
    several: Option<DecodeStep>,
    admitted: u64,
}

struct Running {
    ticket: u64,
    request: Request,
    /// The prompt and what came after it.
    tokens: Vec<u32>,
    /// How many of them the cache holds.
    cached: usize,
}

/// A program that takes `fresh` tokens of each slot.
struct DecodeStep {
    program: ProgramId,
    fresh: usize,
    ids: Buffer,
    start: Buffer,
    position: Buffer,
    logits: Buffer,
}

impl Generator {
    /// A good number of slots where there is work for all of them.
    pub const SLOTS: usize = 16;

    /// Makes a model ready for sequences of at most `columns` tokens, `slots` at once. More columns
    /// than the model's context are not made; `weights` is an arena of the model's layout.
    pub fn new(
        backend: &dyn Backend,
        config: &Config,
        weights: &[f32],
        slots: usize,
        columns: usize,
    ) -> anyhow::Result<Self> {
        config.validate()?;
        let layout = Layout::new(config);
        let slots = slots.clamp(1, MAX_STEP_ROWS);
        let columns = columns.clamp(1, config.max_position_embeddings);
        let fresh = (MAX_STEP_ROWS / slots).min(columns);
        // A step writes all its columns, also those that only some sequences have tokens for.
        let capacity = columns + fresh;
        let a_column = 2
            * config.num_hidden_layers as u128
            * (config.num_key_value_heads * config.head_dim * slots * size_of::<f32>()) as u128;
        let bytes = a_column * capacity as u128;
        if bytes > MAX_KV_CACHE_BYTES as u128 {
            return Err(error::device(
                format!("the KV cache of {slots} x {columns} tokens would take {bytes} bytes"),
                format!("generate fewer tokens: {} fit", MAX_KV_CACHE_BYTES as u128 / a_column),
            ));
        }
        let program = |fresh| step::decoding(config, &layout, slots, fresh, capacity);
        let one = program(1);
        let mut session =
            backend.open(&layout, SessionSpec { training: false, cache_len: one.cache_len })?;
        session.write(Arena::Parameters, weights)?;
        let one = DecodeStep::load(&mut *session, one, 1)?;
        let several = match fresh {
            0 | 1 => None,
            fresh => Some(DecodeStep::load(&mut *session, program(fresh), fresh)?),
        };
        let mut empty = Vec::new();
        empty.resize_with(slots, || None);
        let vocab_size = config.vocab_size;
        Ok(Self { session, vocab_size, columns, slots: empty, one, several, admitted: 0 })
    }

    /// How many requests can be taken in now.
    pub fn free(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_none()).count()
    }

    /// Whether a sequence is running.
    pub fn is_busy(&self) -> bool {
        self.free() < self.slots.len()
    }

    /// The most tokens of a sequence that are read; one more can follow.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Takes a request in; its sequence is known by the number that is returned.
    pub fn admit(&mut self, request: Request) -> anyhow::Result<u64> {
        request.sampling.validate()?;
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(error::checkpoint(
                format!(
                    "the prompt has token {id}, but the vocabulary only {} tokens",
                    self.vocab_size
                ),
                "use the tokenizer that the model was trained with",
            ));
        }
        let length = request.prompt.len();
        if length == 0 || length > self.columns {
            return Err(error::config(
                format!(
                    "invalid prompt of {length} tokens: must be at least 1 and at most {}",
                    self.columns
                ),
                "change the prompt",
            ));
        }
        if request.max_new_tokens == 0 {
            return Err(error::invalid("max_new_tokens", 0, "at least 1"));
        }
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.is_none()) else {
            return Err(error::internal("no free slot in the generator"));
        };
        let ticket = self.admitted;
        self.admitted += 1;
        let tokens = request.prompt.clone();
        *slot = Some(Running { ticket, request, tokens, cached: 0 });
        Ok(ticket)
    }

    /// Brings every sequence further: through its prompt, or by a token of its own, told as an
    /// event. With an error all sequences end.
    pub fn step(&mut self) -> anyhow::Result<Vec<TokenEvent>> {
        let result = self.try_step();
        if result.is_err() {
            self.slots.fill_with(|| None);
        }
        result
    }

    fn try_step(&mut self) -> anyhow::Result<Vec<TokenEvent>> {
        if !self.is_busy() {
            return Ok(Vec::new());
        }
        let step = match &self.several {
            // It costs as much as a few of the others: it has to take more tokens beyond the first
            // of each sequence.
            Some(several) if self.beyond_first(several.fresh) >= MAX_STEP_ROWS / 4 => several,
            _ => &self.one,
        };
        let windows = self.slots.len();
        // A slot without a sequence, and columns beyond a sequence's tokens, hold token 0: it is
        // written where a later token will be, and nothing sees it before.
        let mut ids = vec![0; windows * step.fresh];
        let mut start = vec![0; windows];
        let mut position = vec![0; windows];
        for (slot, running) in self.slots.iter_mut().enumerate() {
            let Some(running) = running else { continue };
            let tokens = &running.tokens[running.cached..];
            let taken = tokens.len().min(step.fresh);
            ids[slot * step.fresh..][..taken].copy_from_slice(&tokens[..taken]);
            start[slot] = running.cached as u32;
            position[slot] = taken as u32 - 1;
            running.cached += taken;
        }
        let indices = vec![
            (step.ids, ids.as_slice()),
            (step.start, start.as_slice()),
            (step.position, position.as_slice()),
        ];
        self.session.run(step.program, &Inputs { indices, ..Inputs::default() })?;
        let logits = self.session.floats(step.program, step.logits)?;

        let mut events = Vec::with_capacity(windows);
        for (slot, logits) in self.slots.iter_mut().zip(logits.chunks(self.vocab_size)) {
            let Some(running) = slot else { continue };
            if running.cached < running.tokens.len() {
                continue;
            }
            let event = running.choose(logits, self.columns)?;
            if event.finish.is_some() {
                *slot = None;
            }
            events.push(event);
        }
        Ok(events)
    }

    /// How many tokens beyond the first of each sequence a step of so many columns would take.
    fn beyond_first(&self, fresh: usize) -> usize {
        let running = self.slots.iter().flatten();
        running.map(|running| (running.tokens.len() - running.cached).min(fresh) - 1).sum()
    }

    /// Answers every request, in their order. They take the slots as these get free.
    pub fn all(&mut self, requests: Vec<Request>) -> anyhow::Result<Vec<Continuation>> {
        let first = self.admitted;
        let mut answers =
            vec![Continuation { ids: Vec::new(), finish: FinishReason::Stop }; requests.len()];
        let mut requests = requests.into_iter();
        loop {
            for _ in 0..self.free() {
                let Some(request) = requests.next() else { break };
                self.admit(request)?;
            }
            if !self.is_busy() {
                return Ok(answers);
            }
            for event in self.step()? {
                let answer = &mut answers[(event.ticket - first) as usize];
                answer.ids.push(event.id);
                if let Some(finish) = event.finish {
                    answer.finish = finish;
                }
            }
        }
    }

    /// Seconds spent in each kind of operation so far, where the backend counts them.
    pub fn profile(&self) -> Vec<(&'static str, f64)> {
        self.session.profile()
    }
}

impl Running {
    fn choose(&mut self, logits: &[f32], columns: usize) -> anyhow::Result<TokenEvent> {
        let Self { ticket, request, tokens, .. } = self;
        let id = request.sampling.choose(logits, request.sequence, tokens.len())?;
        tokens.push(id);
        let finish = if request.stop.contains(&id) {
            Some(FinishReason::Stop)
        } else if tokens.len() - request.prompt.len() == request.max_new_tokens {
            Some(FinishReason::Length)
        } else if tokens.len() > columns {
            Some(FinishReason::Context)
        } else {
            None
        };
        Ok(TokenEvent { ticket: *ticket, id, finish })
    }
}

impl DecodeStep {
    fn load(session: &mut dyn Session, decoding: Decoding, fresh: usize) -> anyhow::Result<Self> {
        let Decoding { program, ids, start, position, logits, .. } = decoding;
        Ok(Self { program: session.load(program)?, fresh, ids, start, position, logits })
    }
}
