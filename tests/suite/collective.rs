//! Training on several processes: the bits do not depend on their number, and no fault hangs.
//!
//! Ranks are threads of this process, or processes that `--gpus` starts, that are started with the variables of
//! torchrun and srun, or that an `mpiexec` starts: that of `LAAM_MPIEXEC`, of `.venv` (scripts/setup-mpi) or of
//! the search path. `ranks.rs` has the faults of single ranks, and every MPI library that is found.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use laam::backend::cpu::Cpu;
use laam::backend::gpu::{Gpu, Mode, Options};
use laam::backend::reference::Reference;
use laam::backend::{Arena, Backend};
use laam::collective::sockets::{MeetingPoint, SocketRanks};
use laam::collective::threads::ThreadRanks;
use laam::collective::{Group, Ranks};
use laam::device::sim::Sim;
use laam::dtype::Dtype;
use laam::error::{ErrorKind, kind_of};
use laam::kernels::BUILD;
use laam::llama::{AdamW, Muon, Optimizer, StepHyperparams};
use laam::model::{Config, initialize};
use laam::random::{Philox, Stream};
use laam::tokens::{Batch, IGNORE};
use laam::train::{Engine, Parallelism, ShardKind};

use crate::support::free_port;
use crate::training::{self, assert_same, checkpoints, metrics, said};

/// Calls `work` in a thread for each of so many ranks; what each returned.
pub fn on_ranks<T: Send>(ranks: usize, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let ranks = ThreadRanks::new(ranks);
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|ranks| {
                let group = Group::new(Box::new(ranks));
                group.set_deadline(Duration::from_mins(1));
                scope.spawn(move || work(group))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank")).collect()
    })
}

/// [`on_ranks`] over sockets.
fn over_sockets<T: Send>(ranks: usize, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let host = "localhost".to_string();
    let meeting = &MeetingPoint { host, port: free_port(), is_local: true, token: 7 };
    let stranger = MeetingPoint { token: 8, ..meeting.clone() };
    thread::scope(|scope| {
        let work = &work;
        // One of another run is turned away.
        let turned_away = scope
            .spawn(move || SocketRanks::meet(1, ranks, &stranger, Duration::from_secs(1)).is_err());
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                scope.spawn(move || {
                    let met = SocketRanks::meet(rank, ranks, meeting, Duration::from_mins(1));
                    work(Group::new(Box::new(met.unwrap())))
                })
            })
            .collect();
        let done = threads.into_iter().map(|thread| thread.join().expect("a rank")).collect();
        assert!(turned_away.join().unwrap());
        done
    })
}

#[test]
fn exchanges_bring_every_piece_to_its_place() {
    let work = |group: Group| {
        let world = group.world();
        assert_eq!((world.local_rank, world.local_size), (world.rank, 3));
        let rank = group.rank() as u8;
        let send: Vec<u8> = (0..3).flat_map(|to| [10 * rank + to; 2]).collect();
        let mut received = vec![0; 6];
        group.all_to_all(&send, &mut received).unwrap();
        let each = group.gather_each(&vec![rank; usize::from(rank)]).unwrap();
        let told = group.broadcast((rank == 0).then(|| vec![7, 8, 9])).unwrap();
        let any = [group.any(rank == 2).unwrap(), group.any(false).unwrap()];
        // More than a socket holds.
        let long = group.gather_each(&vec![rank; 3_000_000]).unwrap();
        let is_whole = |(of, bytes): (usize, &Vec<u8>)| bytes == &vec![of as u8; 3_000_000];
        assert!(long.iter().enumerate().all(is_whole));
        (received, each, told, any, group.decide(100 + u64::from(rank)).unwrap())
    };
    for all in [on_ranks(3, work), over_sockets(3, work)] {
        for (rank, (received, each, told, any, decided)) in all.into_iter().enumerate() {
            let rank = rank as u8;
            assert_eq!(received, [rank, rank, 10 + rank, 10 + rank, 20 + rank, 20 + rank]);
            assert_eq!(each, [vec![], vec![1], vec![2, 2]]);
            assert_eq!((told, any, decided), (vec![7, 8, 9], [true, false], 100));
        }
    }
}

#[test]
fn a_rank_that_is_gone_late_or_elsewhere_is_named_over_sockets() {
    let said = over_sockets(2, |mut group: Group| {
        if group.rank() == 1 {
            group = Group::alone();
        }
        let begin = Instant::now();
        while group.rank() == 0 && group.size() == 2 && group.lost().is_none() {
            assert!(begin.elapsed() < Duration::from_secs(10), "nobody saw that rank 1 is gone");
        }
        group.all_gather(&[1], &mut vec![0; group.size()]).err().map(|why| why.to_string())
    });
    assert_eq!(
        said,
        [Some("rank 0 lost rank 1 in all_gather (call 2): it ended".to_string()), None]
    );
    let said = over_sockets(2, |group| {
        group.set_deadline(Duration::from_millis(50));
        let late = group.rank() == 1;
        thread::sleep(Duration::from_millis(if late { 200 } else { 0 }));
        group.all_gather(&[1], &mut [0; 2]).err().map(|why| why.to_string())
    });
    let late = "rank 0 waited 0.05 s in all_gather (call 2) for rank 1, which did not come";
    assert_eq!(said[0].as_deref(), Some(late));
    let said = over_sockets(2, |group| match group.rank() {
        0 => group.broadcast(Some(vec![0; 8])).unwrap_err().to_string(),
        _ => group.all_gather(&[1], &mut [0; 2]).unwrap_err().to_string(),
    });
    // Whoever sees it first ends.
    let [first, second] = ["broadcast (call 2) of 8 bytes", "all_gather (call 2) of 1 bytes"];
    let expected = [
        format!("rank 0 is in {first}, rank 1 in {second}"),
        format!("rank 1 is in {second}, rank 0 in {first}"),
    ];
    assert!(expected.iter().any(|it| said.contains(it)), "{said:?}");
}

#[test]
fn an_error_of_one_rank_is_one_of_all() {
    let said = on_ranks(3, |group| {
        let own = if group.rank() == 0 { Ok(()) } else { Err(anyhow::anyhow!("disk full")) };
        group.agree(own).unwrap_err().to_string()
    });
    assert_eq!(said, ["rank 1: disk full", "disk full", "rank 1: disk full"]);
}

#[test]
fn a_rank_that_is_late_or_elsewhere_is_an_error_that_names_the_call() {
    let mut ranks = ThreadRanks::new(2);
    ranks[0].set_deadline(Duration::from_millis(20));
    let why = ranks[0].all_gather(&[1], &mut [0; 2]).unwrap_err();
    assert_eq!(
        why.to_string(),
        "rank 0 waited 0.02 s in all_gather (call 1) for rank 1, which did not come"
    );
    assert_eq!(kind_of(&why), Some(ErrorKind::Group));
    let [first, second]: [ThreadRanks; 2] = ThreadRanks::new(2).try_into().ok().unwrap();
    let said = thread::scope(|scope| {
        let other = scope.spawn(move || Group::new(Box::new(second)).gather_each(&[1]).is_err());
        let mut first = first;
        (first.broadcast(&mut [0; 8]).unwrap_err().to_string(), other.join().unwrap())
    });
    let expected = "rank 0 is in broadcast of 8 bytes, rank 1 in all_gather of 8";
    assert_eq!(said, (expected.to_string(), true));
}

/// While rank 0 saves, the others wait; a rank that does not come meanwhile is an error of rank 0.
#[test]
fn ranks_wait_for_the_first_longer_than_it_for_them() {
    let agree = |late: usize| {
        on_ranks(2, |group| {
            group.set_deadline(Duration::from_millis(100));
            if group.rank() == late {
                thread::sleep(Duration::from_millis(400));
            }
            // A rank that comes too late is not to wait for one that is gone.
            let agreed = match (group.rank(), late) {
                (1, 1) => group.agree(Ok(())),
                _ => group.agree_after_first(Ok(())),
            };
            agreed.err().map(|why| why.to_string())
        })
    };
    assert_eq!(agree(0), [None, None]);
    let late = "rank 0 waited 0.1 s in all_gather (call 1) for rank 1, which did not come";
    assert_eq!(agree(1)[0].as_deref(), Some(late));
}

/// A model so small that its steps take no time, of a shape that leaves odd lengths.
fn config(tied: bool) -> Config {
    let config = laam::model::preset("original").unwrap();
    Config {
        vocab_size: 61,
        hidden_size: 8,
        intermediate_size: 12,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        max_position_embeddings: CONTEXT,
        tie_word_embeddings: tied,
        ..config
    }
}

const CONTEXT: usize = 8;

/// Windows of a batch; with so many ignored from window `from` on.
fn batch(windows: usize, number: u32, ignored: std::ops::Range<usize>) -> Batch {
    let random = Philox::new(5, Stream::Test);
    let draw = |at: usize| random.at(number, at as u64)[0] % 61;
    let is_ignored = |at: usize| ignored.contains(&(at / CONTEXT)) || at.is_multiple_of(5);
    let len = windows * CONTEXT;
    Batch {
        windows,
        context: CONTEXT,
        ids: (0..len).map(draw).collect(),
        targets: (0..len).map(|at| if is_ignored(at) { IGNORE } else { draw(at + 1) }).collect(),
        first_key: vec![0; len],
    }
}

/// A way to train.
#[derive(Clone, Copy, Debug)]
struct Way {
    slices: usize,
    ranks: usize,
    shard: ShardKind,
    muon: bool,
    tied: bool,
}

/// What a rank holds after some steps: bits of losses and norms, and of all arenas.
type Held = (Vec<[u64; 2]>, Vec<Vec<u32>>);

/// Steps of two batches each: whole ones, then a partial one that leaves slices empty, and a slice with
/// nothing but ignored targets.
fn train(backend: &dyn Backend, way: Way) -> Held {
    let config = config(way.tied);
    let optimizer = Optimizer {
        adamw: AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8 },
        muon: way.muon.then_some(Muon { momentum: 0.95 }),
        weight_decay: 0.1,
        max_grad_norm: 0.5,
    };
    let mut held = on_ranks(way.ranks, |group| {
        let parallelism = Parallelism { group, slices: way.slices, shard: way.shard };
        let windows = way.slices;
        let mut engine =
            Engine::parallel(backend, &config, &optimizer, windows, CONTEXT, &parallelism).unwrap();
        let weights = initialize(&config, engine.layout(), 3);
        engine.write(Arena::Parameters, &weights).unwrap();
        let mut told = Vec::new();
        for (step, sizes) in [[windows, windows], [windows, windows / 2 + 1]].iter().enumerate() {
            let of = |at: usize| batch(sizes[at], (2 * step + at) as u32, 1..2 + step);
            let hyperparams = StepHyperparams {
                learning_rate: 1e-2,
                muon_learning_rate: 2e-2,
                step: 1 + step as u64,
            };
            let stats = engine.step(&[of(0), of(1)], hyperparams).unwrap();
            assert!(stats.loss.is_finite() && stats.updated(), "{way:?}: {stats:?}");
            told.push([stats.loss.to_bits(), stats.grad_norm.to_bits()]);
        }
        let arenas = [Arena::Parameters, Arena::FirstMoment, Arena::SecondMoment];
        let bits = |arena| engine.read(arena).unwrap().into_iter().map(f32::to_bits).collect();
        (told, arenas.map(bits).to_vec())
    });
    let first = held.swap_remove(0);
    assert!(held.iter().all(|other| *other == first), "{way:?}: ranks hold different values");
    first
}

/// Trains in every way of a grid; those of as many slices must give the same bits.
fn ways_agree(backend: &dyn Backend, slices: &[(usize, &[usize])], models: &[(bool, bool)]) {
    for &(slices, ranks) in slices {
        for &(muon, tied) in models {
            let alone = Way { slices, ranks: 1, shard: ShardKind::None, muon, tied };
            let expected = train(backend, alone);
            for &ranks in ranks {
                for shard in [ShardKind::None, ShardKind::Optimizer] {
                    let way = Way { ranks, shard, ..alone };
                    assert!(train(backend, way) == expected, "{} {way:?}", backend.device());
                }
            }
        }
    }
}

/// AdamW and Muon, tied and not.
const MODELS: [(bool, bool); 2] = [(false, true), (true, false)];

#[test]
fn any_number_of_ranks_trains_the_same_bits_on_the_host() {
    let all: &[(usize, &[usize])] = &[(8, &[2, 4, 8]), (6, &[2, 3, 6])];
    ways_agree(&Cpu::f32(1), all, &MODELS);
    ways_agree(&Cpu::bf16(1), &[(4, &[2])], &MODELS[..1]);
    ways_agree(&Reference::F32, all, &MODELS);
    ways_agree(&Reference::mixed(Dtype::Bf16), &[(4, &[4])], &MODELS[1..]);
}

/// The backend in the simulator, or `None` after a loud line.
fn sim(dtype: Dtype, mode: Mode) -> Option<Gpu> {
    if let Err(why) = BUILD.cuda {
        eprintln!("SKIPPED: several ranks in the simulator, because {why}");
        return None;
    }
    let options = ptx_race::Options { threads: 1, ..ptx_race::Options::default() };
    let open = Arc::new(move || Ok(Box::new(Sim::new(options)?) as _));
    Some(Gpu::new(open, Options { mode, ..Options::new(dtype) }).unwrap())
}

#[test]
fn any_number_of_ranks_trains_the_same_bits_in_the_simulator() {
    // Of eight ranks some have no part of the parameters.
    let two: &[(usize, &[usize])] = &[(4, &[2])];
    for (dtype, mode, models, ways) in [
        (Dtype::F32, Mode::Graphs, &MODELS[..1], &[(8, &[8][..])][..]),
        (Dtype::Bf16, Mode::Eager, &MODELS[1..], two),
        (Dtype::F16, Mode::Graphs, &MODELS[..1], two),
    ] {
        let Some(backend) = sim(dtype, mode) else { return };
        ways_agree(&backend, ways, models);
    }
}

#[test]
#[ignore = "a minute of simulation: scripts/test --all runs it"]
fn any_number_of_ranks_trains_the_same_bits_in_the_simulator_over_the_whole_grid() {
    for (dtype, bound) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 1e-2), (Dtype::F16, 1e-2)] {
        let mut held = Vec::new();
        let way = Way { slices: 4, ranks: 2, shard: ShardKind::Optimizer, muon: false, tied: true };
        for mode in [Mode::Eager, Mode::Graphs] {
            let Some(backend) = sim(dtype, mode) else { return };
            ways_agree(&backend, &[(8, &[2, 4, 8]), (6, &[2, 3, 6])], &MODELS);
            held.push(train(&backend, way));
        }
        assert!(held[0] == held[1], "{dtype:?}: graphs have other bits than eager steps");
        let (on_host, _) = train(&Cpu::f32(1), way);
        for (host, device) in on_host.iter().flatten().zip(held[0].0.iter().flatten()) {
            let [host, device] = [host, device].map(|&bits| f64::from_bits(bits));
            assert!((device / host - 1.0).abs() < bound, "{dtype:?}: {device}, not {host}");
        }
    }
}

/// Slices divide the work, not the result: near to a step in one piece.
#[test]
fn slices_train_what_one_piece_does() {
    for (muon, tied) in MODELS {
        let way = |slices| Way { slices, ranks: 1, shard: ShardKind::None, muon, tied };
        let config = config(tied);
        let one_piece = Parallelism::default();
        let optimizer = Optimizer {
            adamw: AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8 },
            muon: muon.then_some(Muon { momentum: 0.95 }),
            weight_decay: 0.1,
            max_grad_norm: 0.5,
        };
        let cpu = Cpu::f32(1);
        let mut engine =
            Engine::parallel(&cpu, &config, &optimizer, 8, CONTEXT, &one_piece).unwrap();
        let weights = initialize(&config, engine.layout(), 3);
        engine.write(Arena::Parameters, &weights).unwrap();
        let hyperparams =
            StepHyperparams { learning_rate: 1e-2, muon_learning_rate: 2e-2, step: 1 };
        let whole = engine.step(&[batch(8, 0, 1..2), batch(8, 1, 1..2)], hyperparams).unwrap();
        let (told, _) = train(&cpu, way(8));
        let [loss, norm] = told[0].map(f64::from_bits);
        assert!((loss / whole.loss - 1.0).abs() < 1e-6, "{loss} and {}", whole.loss);
        assert!((norm / whole.grad_norm - 1.0).abs() < 1e-5, "{norm} and {}", whole.grad_norm);
    }
}

/// A launcher of an MPI library.
pub struct Mpi {
    pub program: PathBuf,
    pub is_open_mpi: bool,
}

impl Mpi {
    fn of(program: PathBuf) -> Option<Self> {
        let text = Command::new(&program).arg("--version").output().ok()?.stdout;
        let text = String::from_utf8_lossy(&text);
        let is_open_mpi = text.contains("Open MPI") || text.contains("OpenRTE");
        (is_open_mpi || text.contains("HYDRA")).then_some(Self { program, is_open_mpi })
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if self.is_open_mpi {
            // It asks for these as root, and with more processes than processors.
            command.env("OMPI_ALLOW_RUN_AS_ROOT", "1");
            command.env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
            command.args(["--oversubscribe", "--bind-to", "none"]);
        }
        command
    }
}

/// Launchers of all MPI libraries that are found, in the order of [`mpiexec`].
pub fn launchers() -> impl Iterator<Item = Mpi> {
    let given = env::var_os("LAAM_MPIEXEC").map(PathBuf::from);
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv");
    let own = ["bin/mpiexec", "openmpi/bin/mpiexec"].map(|name| venv.join(name));
    let path = env::var_os("PATH").unwrap_or_default();
    let names = ["mpiexec", "mpiexec.mpich", "mpiexec.openmpi"];
    let folders: Vec<PathBuf> = env::split_paths(&path).collect();
    let found = folders.into_iter().flat_map(move |folder| names.map(|name| folder.join(name)));
    let mut known = Vec::new();
    given.into_iter().chain(own).chain(found).filter_map(move |place| {
        let file = place.canonicalize().ok().filter(|file| !known.contains(file))?;
        known.push(file);
        Mpi::of(place)
    })
}

/// An `mpiexec`, or `None` after a loud line.
pub fn mpiexec() -> Option<Mpi> {
    let first = launchers().next();
    if first.is_none() {
        eprintln!("SKIPPED: no mpiexec, so no run on several processes: scripts/setup-mpi");
    }
    first
}

/// `laam train` on several processes, each with the flags; after `:` others for the last one.
pub fn start(mpi: &Mpi, processes: usize, output: &Path, flags: &str, last: &str) -> Command {
    let one = training::train(output, flags);
    let mut command = mpi.command();
    command.envs(one.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let program: Vec<_> = [one.get_program()].into_iter().chain(one.get_args()).collect();
    let (common, other) = if last.is_empty() { (processes, 0) } else { (processes - 1, 1) };
    command.arg("-n").arg(common.to_string()).args(&program);
    if other > 0 {
        command.args([":", "-n", "1"]).args(&program).args(last.split_whitespace());
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for a command that must end by itself.
pub fn ended(mut command: Command) -> Output {
    let began = Instant::now();
    let output = command.output().expect("it starts");
    assert!(began.elapsed() < LIMIT, "{command:?} took {:?}", began.elapsed());
    output
}

/// A fault must have ended all processes by then.
pub const LIMIT: Duration = Duration::from_secs(15);
pub const FLAGS: &str = "--batch_size 8 --dp_slices 4 --logging_steps 2 --save_steps 4 --threads 1";

/// The processes of a run, by their output folder: id, and rank.
pub fn processes(output: &Path) -> Vec<(libc::pid_t, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(process) = entry.file_name().to_string_lossy().parse() else { continue };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).into_owned();
        let mut words = line.split('\0');
        if words.next().is_some_and(|program| program.ends_with("/laam"))
            && line.contains(&*output.to_string_lossy())
        {
            let environment = String::from_utf8_lossy(&read("environ")).into_owned();
            let rank = environment.split('\0').find_map(|variable| {
                let (name, value) = variable.split_once('=')?;
                let known = ["PMI_RANK", "OMPI_COMM_WORLD_RANK", "LAAM_RANK"];
                known.contains(&name).then(|| value.to_string())
            });
            found.push((process, rank.unwrap_or_default()));
        }
    }
    found
}

/// `laam train --gpus 2`.
pub fn start_itself(output: &Path, flags: &str) -> Command {
    let mut command = training::train(output, &format!("{flags} --gpus 2"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts a run that lasts, lets it write some lines, sends a signal to one rank, and waits for the end. Without
/// an `mpiexec` it starts its processes itself, the first of which has no rank.
pub fn signaled(
    mpi: Option<&Mpi>,
    output: &Path,
    flags: &str,
    signal: libc::c_int,
    rank: &str,
) -> Output {
    let flags = format!("{FLAGS} --max_steps 100000 {flags}");
    let command = match mpi {
        Some(mpi) => start(mpi, 2, output, &flags, ""),
        None => start_itself(output, &flags),
    };
    struck(command, output, || {
        let hit: Vec<_> = processes(output).into_iter().filter(|(_, of)| of == rank).collect();
        assert_eq!(hit.len(), 1, "one process of rank {rank}");
        // SAFETY: the process was started by this test.
        assert_eq!(unsafe { libc::kill(hit[0].0, signal) }, 0);
    })
}

/// Starts a run, lets it write some lines, strikes, and waits for the end: within the limit, with no process left.
pub fn struck(mut command: Command, output: &Path, strike: impl FnOnce()) -> Output {
    let before = metrics(output).len();
    let child = command.spawn().expect("it starts");
    let began = Instant::now();
    while metrics(output).len() < before + 4 {
        assert!(began.elapsed() < Duration::from_mins(1), "no lines in a minute");
        thread::sleep(Duration::from_millis(5));
    }
    strike();
    let (done, waits) = mpsc::channel();
    thread::spawn(move || done.send(child.wait_with_output()));
    let Ok(ended) = waits.recv_timeout(LIMIT) else {
        for (process, _) in processes(output) {
            // SAFETY: the process was started by this test.
            unsafe { libc::kill(process, libc::SIGKILL) };
        }
        panic!("it did not end in {LIMIT:?}");
    };
    assert_gone(output);
    ended.unwrap()
}

/// No process of a run is left.
pub fn assert_gone(output: &Path) {
    let gone = Instant::now();
    while !processes(output).is_empty() {
        assert!(gone.elapsed() < Duration::from_secs(5), "processes are left");
        thread::sleep(Duration::from_millis(10));
    }
}

/// One, two and four processes; a kill on the way, and the rest on other numbers of processes, with the
/// optimizer sharded and not.
#[test]
fn one_two_and_four_processes_write_the_same_files_and_resume_each_other() {
    let Some(mpiexec) = mpiexec() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let flags = format!("{FLAGS} --max_steps 16");
    training::trained(&at("1"), &flags);
    for processes in [2, 4] {
        let output = at(&processes.to_string());
        let done = ended(start(&mpiexec, processes, &output, &flags, ""));
        assert!(done.status.success(), "{}", said(&done));
        assert!(done.stdout.is_empty() && said(&done).contains("4 slices"), "{}", said(&done));
        assert_same(&at("1"), &output, &format!("{processes} processes"));
        let lines = metrics(&output);
        assert!(lines.iter().all(|line| line.ranks == Some(processes)));
        assert!(
            lines.iter().all(|line| line.wait_seconds.is_some_and(|[least, most]| least <= most))
        );
    }
    let parts = at("parts");
    // The total is in the state: it is the same from the start.
    for (processes, more, until) in [(4, "", 4), (2, "--shard none", 8), (1, "", 12), (4, "", 16)] {
        let resume = if until == 4 { "" } else { "--resume" };
        let flags = format!("{FLAGS} --max_steps 16 {more} {resume}");
        let mut child = start(&mpiexec, processes, &parts, &flags, "").spawn().unwrap();
        let newest = || if parts.exists() { checkpoints(&parts).last().copied() } else { None };
        while newest().is_none_or(|step| step < until) && child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        if until < 16 {
            for (process, _) in self::processes(&parts) {
                // SAFETY: the process was started by this test.
                unsafe { libc::kill(process, libc::SIGKILL) };
            }
        }
        child.wait().unwrap();
    }
    assert_same(&at("1"), &parts, "4, 2, 1 and 4 processes");
}

#[test]
fn a_rank_that_is_killed_or_stopped_ends_all_and_leaves_the_last_checkpoint_whole() {
    let Some(mpiexec) = mpiexec() else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let killed = signaled(Some(&mpiexec), &output, "", libc::SIGKILL, "1");
    assert!(!killed.status.success());
    let late = signaled(Some(&mpiexec), &output, "--resume --rank_timeout 2", libc::SIGSTOP, "1");
    let said = said(&late);
    // A checkpoint that was being written is passed over.
    assert!(said.contains("resuming after step "), "{said}");
    assert!(said.contains("laam: rank 0 waited 2 s in ") && said.contains("(call "), "{said}");
    assert_eq!(late.status.code(), Some(75), "{said}");
}

#[test]
fn processes_that_gpus_starts_have_the_bits_of_one_and_end_together() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let flags = format!("{FLAGS} --max_steps 12");
    training::trained(&at("1"), &flags);
    let done = ended(start_itself(&at("2"), &flags));
    assert!(done.status.success(), "{}", said(&done));
    assert!(said(&done).contains("2 processes (sockets), 4 slices"), "{}", said(&done));
    assert_same(&at("1"), &at("2"), "--gpus 2");

    let run = at("run");
    let killed = signaled(None, &run, "", libc::SIGKILL, "1");
    assert_eq!(killed.status.code(), Some(128 + libc::SIGKILL), "{}", said(&killed));
    assert!(said(&killed).contains("laam: rank 0 lost rank 1 in "), "{}", said(&killed));
    assert!(said(&killed).contains("laam: rank 1 was ended by signal 9"), "{}", said(&killed));
    let late = signaled(None, &run, "--resume --rank_timeout 1", libc::SIGSTOP, "1");
    assert_eq!(late.status.code(), Some(75), "{}", said(&late));
    assert!(said(&late).contains("laam: rank 0 waited 1 s in "), "{}", said(&late));
    // To the process that started the others: it passes it on.
    let stopped = signaled(None, &run, "--resume", libc::SIGUSR1, "");
    assert_eq!(stopped.status.code(), Some(130), "{}", said(&stopped));
    assert!(said(&stopped).contains("stopped after step "), "{}", said(&stopped));

    // An error of all ranks is told once; one of a rank has the exit code of that one.
    let one_slice = flags.replace("--dp_slices 4", "--dp_slices 1");
    let refused = ended(start_itself(&at("3"), &one_slice));
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert_eq!(said(&refused).matches("1 slices of a step").count(), 1, "{}", said(&refused));
    let mut twice = start_itself(&at("3"), &flags);
    twice.env("PMI_RANK", "0").env("PMI_SIZE", "2");
    let twice = ended(twice);
    assert_eq!(twice.status.code(), Some(2));
    assert!(said(&twice).contains("there are more: mpiexec of MPICH"), "{}", said(&twice));
}

/// As torchrun and srun start them, without either.
#[test]
fn processes_with_the_variables_of_torchrun_or_srun_meet() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let flags = format!("{FLAGS} --max_steps 8");
    training::trained(&at("1"), &flags);
    let port = free_port();
    let torchrun: &[(&str, String)] = &[
        ("WORLD_SIZE", "4".into()),
        ("LOCAL_WORLD_SIZE", "4".into()),
        ("MASTER_ADDR", "localhost".into()),
        ("MASTER_PORT", (port - 1).to_string()),
    ];
    let slurm: &[(&str, String)] = &[
        ("SLURM_STEP_NUM_TASKS", "4".into()),
        ("SLURM_STEP_NODELIST", "localhost".into()),
        // Not all on one host: rank 0 listens at every address.
        ("SLURM_STEP_NUM_NODES", "2".into()),
        ("SLURM_JOB_ID", (free_port() - 20_000).to_string()),
    ];
    for (name, rank_variable, variables) in
        [("torchrun", "RANK", torchrun), ("srun", "SLURM_PROCID", slurm)]
    {
        let start = |rank: usize| {
            let mut command = training::train(&at(name), &flags);
            command.envs(variables.iter().map(|(name, value)| (name, value)));
            command.env(rank_variable, rank.to_string()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let children: Vec<_> = [1, 3, 0, 2].into_iter().map(start).collect();
        for child in children {
            let done = child.wait_with_output().unwrap();
            assert!(done.status.success(), "{name}: {}", said(&done));
        }
        assert_same(&at("1"), &at(name), name);
    }
}

#[test]
fn sigusr1_finishes_the_step_saves_and_exits_with_130() {
    let Some(mpiexec) = mpiexec() else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    // To one rank alone: all of them agree to stop.
    let stopped = signaled(Some(&mpiexec), &output, "", libc::SIGUSR1, "1");
    let said = said(&stopped);
    assert_eq!(stopped.status.code(), Some(130), "{said}");
    assert!(said.contains("stopped after step "), "{said}");
    assert!(!checkpoints(&output).is_empty());
}

#[test]
fn processes_that_do_not_fit_together_are_refused() {
    let Some(mpiexec) = mpiexec() else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let flags = format!("{FLAGS} --max_steps 2");
    let other = ended(start(&mpiexec, 2, &output, &flags, "--seed 3"));
    let said_of = |output: &Output| said(output);
    assert_eq!(other.status.code(), Some(75), "{}", said_of(&other));
    let expected = "rank 1 was started with other settings than rank 0: --seed is 3, not 42";
    assert!(said_of(&other).contains(expected), "{}", said_of(&other));
    let three = ended(start(&mpiexec, 3, &output, &flags, ""));
    assert_eq!(three.status.code(), Some(2), "{}", said_of(&three));
    assert!(said_of(&three).contains("4 slices of a step cannot be divided among 3 processes"));
    let mut command = start(&mpiexec, 2, &output, &flags, "");
    command.env("RANK", "1").env("WORLD_SIZE", "8").env("MASTER_ADDR", "localhost");
    let two = ended(command);
    assert_eq!(two.status.code(), Some(2), "{}", said_of(&two));
    assert!(said_of(&two).contains("WORLD_SIZE says process 1 of 8"), "{}", said_of(&two));
    assert!(!output.exists(), "nothing was written");
}
