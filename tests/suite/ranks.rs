//! Faults of single ranks, every MPI library that is found, and hosts that only a network connects: each ends all
//! processes in time, with a message and an exit code, and leaves the last checkpoint whole.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::collective::{
    FLAGS, Mpi, assert_gone, ended, launchers, mpiexec, signaled, start, start_itself, struck,
};
use crate::faults::{assert_whole, shim};
use crate::support::free_port;
use crate::training::{self, assert_same, metrics, said};

/// The prefix of a launcher's installation, whose libraries lie in `lib`.
fn prefix(mpi: &Mpi) -> PathBuf {
    let program = mpi.program.canonicalize().unwrap();
    program.ancestors().nth(2).unwrap().to_path_buf()
}

/// The program with another byte where none is read: another build of the same length.
fn other_build(folder: &Path) -> PathBuf {
    let other = folder.join("laam");
    let mut bytes = fs::read(training::train(folder, "").get_program()).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&other, bytes).unwrap();
    fs::set_permissions(&other, fs::Permissions::from_mode(0o755)).unwrap();
    other
}

#[test]
fn a_rank_that_panics_or_whose_disk_is_full_ends_all() {
    let Some(shim) = shim() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let output = at("panic");
    let mut command = start_itself(&output, &format!("{FLAGS} --max_steps 100000"));
    command.env("LD_PRELOAD", shim).env("FAULT_RANK", "1").env("FAULT_PANIC", at("now"));
    let done = struck(command, &output, || fs::write(at("now"), "").unwrap());
    assert_eq!(done.status.code(), Some(2), "{}", said(&done));
    assert!(said(&done).contains("rank 1: laam: panicked at "), "{}", said(&done));
    assert!(said(&done).contains("laam: rank 0 lost rank 1 in "), "{}", said(&done));
    assert_whole(&output, "a panic of rank 1");

    let (output, flags) = (at("full"), format!("{FLAGS} --max_steps 40"));
    let mut command = start_itself(&output, &flags);
    command.env("LD_PRELOAD", shim).env("FAULT_UNDER", &output).env("FAULT_LOG", at("log"));
    command.env("FAULT_AT", "200").env("FAULT_STICKY", "1");
    command.env("FAULT_ERRNO", libc::ENOSPC.to_string());
    let done = ended(command);
    assert_gone(&output);
    assert_eq!(done.status.code(), Some(2), "{}", said(&done));
    assert_eq!(said(&done).matches("No space left on device").count(), 1, "{}", said(&done));
    assert_whole(&output, "the disk of rank 0 is full");
    training::trained(&at("1"), &flags);
    let resumed = ended(start_itself(&output, &format!("{flags} --resume")));
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert_same(&at("1"), &output, "resumed after the disk was full");
}

/// Rank 1's clock runs a hundred times as fast: by it steps are slow, the time for the run is over at once, and a
/// rank that decided by it would leave the exchanges of the others.
#[test]
fn what_depends_on_a_clock_is_decided_by_rank_0() {
    let Some(shim) = shim() else { return };
    let folder = tempfile::tempdir().unwrap();
    // A checkpoint per step is not always written by the next one; without any, many steps are asked for at once.
    for (backend, save_steps, steps) in [("cpu", 1000, 70), ("sim", 1, 20), ("sim", 1000, 60)] {
        if let (Err(why), "sim") = (laam::kernels::BUILD.cuda, backend) {
            return eprintln!("SKIPPED: ranks in the simulator with other clocks, because {why}");
        }
        let output = folder.path().join(steps.to_string());
        let flags = format!(
            "--backend {backend} --batch_size 2 --dp_slices 2 --max_steps {steps} --threads 1 --save_steps {save_steps} \
             --logging_steps 1000 --num_hidden_layers 1 --max_position_embeddings 16 --max_seconds 60 \
             --rank_timeout 1500"
        );
        let mut command = start_itself(&output, &flags);
        command.env("LD_PRELOAD", shim).env("FAULT_RANK", "1").env("FAULT_CLOCK_RATE", "100");
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        assert_eq!(metrics(&output).last().unwrap().step, steps);
        let is_named = said(&done).contains("warning: rank 1 is slowest, ");
        assert!(is_named || backend != "cpu", "{}", said(&done));
    }
}

#[test]
fn a_rank_of_another_build_or_that_never_comes_is_told_of() {
    let Some(mpi) = mpiexec() else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let flags = format!("{FLAGS} --max_steps 2 --rank_timeout 1");
    let one = training::train(&output, &flags);
    let with_second = |program: &Path, arguments: &[&str]| -> Output {
        let mut command = start(&mpi, 1, &output, &flags, "");
        command.args([":", "-n", "1"]).arg(program).args(arguments);
        let done = ended(command);
        assert_gone(&output);
        assert!(!output.exists(), "nothing was written");
        done
    };
    let arguments: Vec<&str> = one.get_args().map(|word| word.to_str().unwrap()).collect();
    let other = with_second(&other_build(folder.path()), &arguments);
    assert_eq!(other.status.code(), Some(75), "{}", said(&other));
    let expected = "laam: rank 1 is another build of laam than rank 0";
    assert!(said(&other).contains(expected), "{}", said(&other));

    let late = with_second(Path::new("sleep"), &["20"]);
    assert_eq!(late.status.code(), Some(75), "{}", said(&late));
    let expected = "laam: waited 1 s in MPI_Init for a process that did not come";
    assert!(said(&late).contains(expected), "{}", said(&late));
    let mut alone = training::train(&output, &flags);
    let port = (free_port() - 1).to_string();
    alone.env("RANK", "0").env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
    alone.env("MASTER_ADDR", "localhost").env("MASTER_PORT", port);
    let alone = ended(alone);
    assert_eq!(alone.status.code(), Some(75), "{}", said(&alone));
    assert!(said(&alone).contains("laam: no other rank came to localhost:"), "{}", said(&alone));

    // As another MPI's launcher starts it: the library sees one process.
    let mut foreign = training::train(&output, &flags);
    let name = if mpi.is_open_mpi { "OMPI_COMM_WORLD" } else { "PMI" };
    foreign.env(format!("{name}_RANK"), "0").env(format!("{name}_SIZE"), "2");
    foreign.env("VIRTUAL_ENV", prefix(&mpi));
    let foreign = ended(foreign);
    assert_eq!(foreign.status.code(), Some(2), "{}", said(&foreign));
    let expected = "sees process 0 of 1: its launcher is another one's";
    assert!(said(&foreign).contains(expected), "{}", said(&foreign));
}

#[test]
#[ignore = "half a minute per MPI library: scripts/test --all runs it"]
fn every_mpi_library_has_the_bits_of_one_process_and_ends_with_its_faults() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: String| folder.path().join(name);
    let flags = format!("{FLAGS} --max_steps 16");
    let one = at("one".into());
    training::trained(&one, &flags);
    let all: Vec<Mpi> = launchers().collect();
    for (number, mpi) in all.iter().enumerate() {
        let of = |name: &str| at(format!("{number}-{name}"));
        for processes in [1, 2, 4] {
            let output = of(&processes.to_string());
            let done = ended(start(mpi, processes, &output, &flags, ""));
            assert!(done.status.success(), "{}", said(&done));
            let library = said(&done).lines().find_map(|line| {
                let inner = line.split_once(" processes (")?.1;
                Some(inner.split_once(')')?.0.to_string())
            });
            assert_eq!(library.is_some(), processes > 1, "{}", said(&done));
            assert_same(&one, &output, &format!("{processes} processes of {library:?}"));
            if processes == 4 {
                eprintln!("{}: {}", mpi.program.display(), library.unwrap_or_default());
            }
        }
        let run = of("faults");
        let killed = signaled(Some(mpi), &run, "", libc::SIGKILL, "1");
        assert!(matches!(killed.status.code(), Some(9 | 137)), "{}", said(&killed));
        assert_whole(&run, "a rank was killed");
        let late = signaled(Some(mpi), &run, "--resume --rank_timeout 2", libc::SIGSTOP, "1");
        assert_eq!(late.status.code(), Some(75), "{}", said(&late));
        assert!(said(&late).contains("laam: rank 0 waited 2 s in "), "{}", said(&late));
        assert_whole(&run, "a rank was stopped");
        let stopped = signaled(Some(mpi), &run, "--resume", libc::SIGUSR1, "1");
        assert_eq!(stopped.status.code(), Some(130), "{}", said(&stopped));
        if let Some(shim) = shim() {
            let mut command =
                start(mpi, 2, &run, &format!("{FLAGS} --max_steps 100000 --resume"), "");
            let now = of("now");
            command.env("LD_PRELOAD", shim).env("FAULT_RANK", "1").env("FAULT_PANIC", &now);
            let done = struck(command, &run, || fs::write(&now, "").unwrap());
            assert_eq!(done.status.code(), Some(2), "{}", said(&done));
            assert!(said(&done).contains("laam: panicked at "), "{}", said(&done));
            assert_whole(&run, "a rank panicked");
        }
        // The library of every other family.
        for other in all.iter().filter(|other| other.is_open_mpi != mpi.is_open_mpi) {
            let names = if other.is_open_mpi {
                &["libmpi.so.40"][..]
            } else {
                &["libmpi_abi.so.1", "libmpich.so.12"]
            };
            let folders = ["lib", "lib/x86_64-linux-gnu"].map(|folder| prefix(other).join(folder));
            let mut places =
                folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
            let Some(library) = places.find(|place| place.is_file()) else { continue };
            let mut command = start(mpi, 2, &of("foreign"), &flags, "");
            command.env("LAAM_MPI", &library);
            let foreign = ended(command);
            assert_eq!(foreign.status.code(), Some(2), "{}", said(&foreign));
            assert!(
                said(&foreign).contains("laam: started by an mpiexec of "),
                "{}",
                said(&foreign)
            );
        }
    }
    for (is_open_mpi, name) in [(true, "Open MPI"), (false, "MPICH")] {
        if !all.iter().any(|mpi| mpi.is_open_mpi == is_open_mpi) {
            eprintln!(
                "SKIPPED: training on several processes of {name}, because it was not found: scripts/setup-mpi"
            );
        }
    }
}

/// The launch code of the GPU backend in several processes.
#[test]
#[ignore = "a minute of simulation: scripts/test --all runs it"]
fn processes_in_the_simulator_have_the_bits_of_one_near_those_of_the_host() {
    let Some(mpi) = mpiexec() else { return };
    if let Err(why) = laam::kernels::BUILD.cuda {
        return eprintln!("SKIPPED: processes in the simulator, because {why}");
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (precision, bound) in [("float32", 1e-5), ("bfloat16", 1e-2)] {
        let flags = format!(
            "--batch_size 4 --dp_slices 2 --max_steps 3 --logging_steps 1 --threads 1 --num_hidden_layers 1 \
             --max_position_embeddings 16 --precision {precision} --backend"
        );
        let [one, two, host] =
            ["one", "two", "host"].map(|name| at(&format!("{name}-{precision}")));
        training::trained(&one, &format!("{flags} sim"));
        let done = ended(start(&mpi, 2, &two, &format!("{flags} sim"), ""));
        assert!(done.status.success(), "{}", said(&done));
        assert_same(&one, &two, "two processes in the simulator");
        training::trained(&host, &format!("{flags} cpu"));
        for (host, sim) in metrics(&host).iter().zip(metrics(&one)) {
            assert!((sim.loss / host.loss - 1.0).abs() < bound, "{precision}: {sim:?}, {host:?}");
        }
    }
}

/// Two hosts with names of their own, 10.199.77.1 and .2, which a pair of virtual network interfaces connects.
struct Hosts;

const HOSTS: [&str; 2] = ["laam-test-1", "laam-test-2"];

fn ip(arguments: &str) -> bool {
    let done = Command::new("ip").args(arguments.split(' ')).stderr(Stdio::null()).status();
    done.is_ok_and(|status| status.success())
}

impl Hosts {
    /// `None` after a loud line without the rights for it.
    fn new() -> Option<Hosts> {
        let [first, second] = HOSTS;
        let made = ip(&format!("netns add {first}")) && ip(&format!("netns add {second}"));
        // Given back also if only one of them could be made.
        let hosts = Hosts;
        let made = made
            && ip(&format!("-n {first} link add laam0 type veth peer name laam0 netns {second}"))
            && HOSTS.iter().zip(["10.199.77.1/24", "10.199.77.2/24"]).all(|(host, address)| {
                ip(&format!("-n {host} address add {address} dev laam0"))
                    && ip(&format!("-n {host} link set laam0 up"))
                    && ip(&format!("-n {host} link set lo up"))
            });
        if !made {
            eprintln!(
                "SKIPPED: training on two hosts, because network namespaces need root and iproute2"
            );
        }
        made.then_some(hosts)
    }

    /// A shell's line on a host, with the words `$@` of another command.
    fn line(host: &str) -> [String; 9] {
        let inner = format!("hostname {host}; exec \"$@\"");
        ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", &inner].map(String::from)
    }

    /// A command on a host.
    fn on(host: usize, command: &Command) -> Command {
        let mut outer = Command::new("ip");
        outer.args(&Self::line(HOSTS[host])[1..]).arg("sh");
        outer.arg(command.get_program()).args(command.get_args());
        outer.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        outer.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        outer
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in HOSTS {
            ip(&format!("netns delete {host}"));
        }
    }
}

/// As on two hosts that see different folders: rank 1 finds no checkpoint.
#[test]
fn ranks_that_resume_other_steps_end_before_they_take_one() {
    let folder = tempfile::tempdir().unwrap();
    let hosts = ["a", "b"].map(|name| folder.path().join(name));
    for host in &hosts {
        fs::create_dir(host).unwrap();
    }
    let namespace = ["--map-root-user", "--uts", "sh", "-ec"];
    let mut can = Command::new("unshare");
    can.args(namespace).arg("hostname laam-a").stderr(Stdio::null());
    if !can.status().is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: ranks that resume other steps, because unshare --uts is not permitted");
        return;
    }
    training::trained(&hosts[0].join("run"), &format!("{FLAGS} --max_steps 4"));
    let model = || fs::read(hosts[0].join("run/model.safetensors")).unwrap();
    let before = model();
    let port = (free_port() - 1).to_string();
    let children = [1, 0].map(|host: usize| {
        let program = training::train(Path::new("run"), &format!("{FLAGS} --max_steps 8 --resume"));
        let mut command = Command::new("unshare");
        let script = format!("hostname laam-{host}; exec \"$@\"");
        command.args(namespace).args([&script, "sh"]);
        command.arg(program.get_program()).args(program.get_args());
        command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("RANK", host.to_string()).env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "1");
        command.env("MASTER_ADDR", "localhost").env("MASTER_PORT", &port);
        command.current_dir(&hosts[host]).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    });
    let done = children.map(|child| child.wait_with_output().unwrap());
    assert!(done.iter().all(|done| done.status.code() == Some(75)), "{done:?}");
    let expected = "laam: rank 1 begins after step 0, rank 0 after step 4";
    assert!(done.iter().any(|done| said(done).contains(expected)), "{done:?}");
    assert!(model() == before, "nothing was written");
}

/// In a network of its own, whose sockets have one of four ports, that of rank 0 among them: a socket that connects
/// to it before rank 0 listens is soon given that port itself, and meets itself.
#[test]
fn a_rank_that_comes_first_does_not_take_itself_for_rank_0() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let flags = format!("{FLAGS} --max_steps 2");
    training::trained(&at("1"), &flags);
    let namespace = ["--map-root-user", "--net", "sh", "-ec"];
    let ports = "ip link set lo up; echo 40000 40003 >/proc/sys/net/ipv4/ip_local_port_range";
    let can = Command::new("unshare").args(namespace).arg(ports).stderr(Stdio::null()).status();
    if !can.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a rank that comes first, because unshare --net is not permitted");
        return;
    }
    let program = training::train(&at("2"), &flags);
    let mut ranks = Command::new("unshare");
    let script = format!("{ports}; RANK=1 \"$@\" & sleep 2; RANK=0 \"$@\" || kill $!; wait $!");
    ranks.args(namespace).args([&script, "sh"]).arg(program.get_program()).args(program.get_args());
    ranks.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    ranks.env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
    ranks.env("MASTER_ADDR", "localhost").env("MASTER_PORT", "39999");
    let done = ended(ranks);
    assert!(done.status.success(), "{}", said(&done));
    assert_same(&at("1"), &at("2"), "a rank that comes first");
}

#[test]
#[ignore = "needs root, for network namespaces: scripts/test --all runs it"]
fn two_hosts_have_the_bits_of_one() {
    let Some(_hosts) = Hosts::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let flags = format!("{FLAGS} --max_steps 8");
    training::trained(&at("1"), &flags);

    // As torchrun starts one process on each.
    let port = free_port() - 1;
    let start_on = |host: usize| -> Child {
        let mut command = Hosts::on(host, &training::train(&at("sockets"), &flags));
        command.env("RANK", host.to_string()).env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "1");
        command.env("MASTER_ADDR", "10.199.77.1").env("MASTER_PORT", port.to_string());
        command.spawn().unwrap()
    };
    for child in [1, 0].map(start_on) {
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
    }
    assert_same(&at("1"), &at("sockets"), "sockets between two hosts");

    // In place of ssh: the last words of its arguments are the command, after options and the host.
    let agent = at("agent");
    let [first, second] = HOSTS.map(|host| {
        let line = Hosts::line(host).map(|word| format!("'{word}'")).join(" ");
        format!("exec {line} sh sh -c \"$*\"")
    });
    let text = format!(
        "#!/bin/sh\nwhile :; do\n  case $1 in\n    *.1) shift; {first};;\n    *.2) shift; {second};;\n    *) shift;;\n  \
         esac\ndone\n"
    );
    fs::write(&agent, text).unwrap();
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
    for (number, mpi) in launchers().enumerate() {
        let output = at(&format!("mpi-{number}"));
        let mut command = mpi.command();
        let agent = agent.to_str().unwrap();
        if mpi.is_open_mpi {
            command.args(["--host", "10.199.77.1:1,10.199.77.2:1", "--mca", "btl", "tcp,self"]);
            command.args(["--mca", "plm_rsh_agent", agent, "--mca", "plm_ssh_agent", agent]);
        } else {
            command.args(["-hosts", "10.199.77.1,10.199.77.2", "-launcher", "ssh"]);
            command.args(["-launcher-exec", agent]);
        }
        let one = training::train(&output, &flags);
        command.envs(one.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.args(["-n", "2"]).arg(one.get_program()).args(one.get_args());
        let mut command = Hosts::on(0, &command);
        command.env("PATH", env::var_os("PATH").unwrap_or_default());
        let done = ended(command);
        assert!(done.status.success(), "{}: {}", mpi.program.display(), said(&done));
        eprintln!("{}: on two hosts", mpi.program.display());
        assert_same(&at("1"), &output, "MPI between two hosts");
    }
}
