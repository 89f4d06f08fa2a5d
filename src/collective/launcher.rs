//! What started this process, by its environment, and the group that it joins.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::os::fd::RawFd;
use std::time::Duration;

use super::mpi::{self, MpiFamily};
use super::sockets::{MeetingPoint, SocketRanks};
use super::{Group, Ranks};
use crate::error;

/// A program that starts the processes of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// This program, by `--gpus`.
    Gpus,
    /// PyTorch's `torchrun`.
    Torchrun,
    /// An MPI library's.
    Mpi(MpiFamily),
    /// `srun` without an MPI of its own.
    Slurm,
}

/// Variables by which `--gpus` tells a process its rank, the number of processes, and the descriptors of its
/// streams, by rank: `-,5,6`.
pub const OWN_VARIABLES: [&str; 3] = ["LAAM_RANK", "LAAM_WORLD_SIZE", "LAAM_SOCKETS"];

/// The place in a group that the environment gives this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchPlace {
    /// Kind of the launcher.
    pub launcher: Launcher,
    /// Number of this process, from 0.
    pub rank: usize,
    /// Number of all processes.
    pub size: usize,
    /// The variable that names the size.
    size_variable: &'static str,
    /// Way to the other processes, if the launcher is not MPI's.
    way: Option<Way>,
}

/// Way to the other processes of a launcher without an MPI.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    Streams(Vec<Option<RawFd>>),
    Meeting(MeetingPoint),
}

/// Launchers in the order of precedence, each with its variables of rank and size.
const LAUNCHERS: [(Launcher, &str, &str); 5] = [
    (Launcher::Gpus, OWN_VARIABLES[0], OWN_VARIABLES[1]),
    (Launcher::Torchrun, "RANK", "WORLD_SIZE"),
    (Launcher::Mpi(MpiFamily::OpenMpi), "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    (Launcher::Mpi(MpiFamily::Mpich), "PMI_RANK", "PMI_SIZE"),
    // An sbatch or salloc shell has SLURM_NTASKS too; only a step has this one.
    (Launcher::Slurm, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
];

impl LaunchPlace {
    /// Launcher and place of this process.
    pub fn detect() -> anyhow::Result<Option<Self>> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// # Errors
    /// Two launchers that disagree, or variables that are no numbers.
    pub fn from_variables(
        variable: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Option<Self>> {
        let mut found: Vec<Self> = Vec::new();
        for (launcher, rank_variable, size_variable) in LAUNCHERS {
            let (Some(rank), Some(size)) = (variable(rank_variable), variable(size_variable))
            else {
                continue;
            };
            if launcher == Launcher::Torchrun && variable("MASTER_ADDR").is_none() {
                continue;
            }
            let number = |name: &str, text: &str| {
                text.parse::<usize>().map_err(|_| {
                    error::config(
                        format!("invalid {name} {text:?} in the environment: must be a number"),
                        "start laam by mpiexec, torchrun or srun, or unset the variable",
                    )
                })
            };
            let (rank, size) = (number(rank_variable, &rank)?, number(size_variable, &size)?);
            if rank >= size {
                return Err(error::config(
                    format!("{rank_variable} is {rank}, but {size_variable} {size}"),
                    "start laam by mpiexec, torchrun or srun, or unset the variables",
                ));
            }
            // A step of one task is one process.
            if launcher == Launcher::Slurm && size == 1 {
                continue;
            }
            found.push(Self { launcher, rank, size, size_variable, way: None });
            // Its processes inherit the variables of what started it.
            if launcher == Launcher::Gpus {
                break;
            }
        }
        let Some(first) = found.first() else { return Ok(None) };
        if let Some(other) =
            found.iter().find(|other| (other.rank, other.size) != (first.rank, first.size))
        {
            let say = |place: &Self| {
                format!("{} says process {} of {}", place.size_variable, place.rank, place.size)
            };
            return Err(error::config(
                format!("two launchers that disagree: {}, {}", say(first), say(other)),
                "start laam by one of them, or unset the variables of the other",
            ));
        }
        // Where the same place has an MPI, its library is there; srun has the interface of one without it.
        let with_mpi = found.iter().find(|place| matches!(place.launcher, Launcher::Mpi(_)));
        let mut place = with_mpi.unwrap_or(first).clone();
        if place.size > 1 {
            let mut ways = found.iter().map(|place| way(place.launcher, place.size, &variable));
            place.way = match with_mpi {
                Some(_) => ways.find_map(|way| way.ok().flatten()),
                None => ways.next().transpose()?.flatten(),
            };
        }
        Ok(Some(place))
    }

    /// For people: `mpiexec (MPICH), process 1 of 4`.
    pub fn describe(&self) -> String {
        let launcher = match self.launcher {
            Launcher::Gpus => "laam --gpus",
            Launcher::Torchrun => "torchrun",
            Launcher::Mpi(MpiFamily::OpenMpi) => "mpirun of Open MPI",
            Launcher::Mpi(MpiFamily::Mpich) => "mpiexec of MPICH",
            Launcher::Slurm => "srun",
        };
        format!("{launcher}, process {} of {}", self.rank, self.size)
    }

    /// Joins the other processes, waiting for each until the deadline.
    ///
    /// # Errors
    /// No library to do it with, one that sees another number of processes, or a process that does not come.
    pub fn join(&self, deadline: Duration) -> anyhow::Result<Group> {
        if self.size == 1 {
            return Ok(Group::alone());
        }
        let family = match (self.launcher, &self.way) {
            (Launcher::Mpi(family), None) => family,
            (Launcher::Mpi(family), Some(_)) if mpi::find(family).is_some() => family,
            (_, Some(Way::Streams(streams))) => {
                let ranks = SocketRanks::inherited(self.rank, streams)?;
                return Ok(Group::new(Box::new(ranks)));
            }
            (_, Some(Way::Meeting(meeting))) => {
                let ranks = SocketRanks::meet(self.rank, self.size, meeting, deadline)?;
                return Ok(Group::new(Box::new(ranks)));
            }
            (_, None) => return Err(error::internal("a launcher without a way to its processes")),
        };
        let ranks = mpi::MpiRanks::start(family, deadline)?;
        let world = ranks.world().clone();
        if (world.rank, world.size) != (self.rank, self.size) {
            return Err(error::config(
                format!(
                    "{} says process {} of {}, but {} sees process {} of {}: its launcher is another one's",
                    self.size_variable, self.rank, self.size, world.library, world.rank, world.size
                ),
                "use the mpiexec of the MPI library that is found, or name the library in LAAM_MPI",
            ));
        }
        Ok(Group::new(Box::new(ranks)))
    }
}

/// Way to the other processes, if the launcher is not MPI's.
fn way(
    launcher: Launcher,
    size: usize,
    variable: &impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Option<Way>> {
    let invalid = |name: &str| {
        let value = variable(name).unwrap_or_default();
        error::config(
            format!("invalid {name} {value:?} in the environment"),
            "start laam by mpiexec, torchrun or srun, or unset the variable",
        )
    };
    let token = |names: &[&str]| {
        let mut hasher = DefaultHasher::new();
        for name in names {
            variable(name).hash(&mut hasher);
        }
        hasher.finish()
    };
    let is = |name: &str, number: usize| variable(name).is_some_and(|it| it == number.to_string());
    Ok(Some(match launcher {
        Launcher::Mpi(_) => return Ok(None),
        Launcher::Gpus => {
            let name = OWN_VARIABLES[2];
            let text = variable(name).unwrap_or_default();
            let streams: Vec<Option<RawFd>> =
                text.split(',').map(|stream| stream.parse().ok()).collect();
            if streams.len() != size || streams.iter().flatten().count() != size - 1 {
                return Err(invalid(name));
            }
            Way::Streams(streams)
        }
        Launcher::Torchrun => {
            let port = variable("MASTER_PORT").and_then(|port| port.parse::<u16>().ok());
            let port = port.filter(|port| *port > 1).ok_or_else(|| invalid("MASTER_PORT"))?;
            Way::Meeting(MeetingPoint {
                host: variable("MASTER_ADDR").unwrap_or_default(),
                // Its agent listens at the port itself.
                port: port.checked_add(1).unwrap_or(port - 1),
                is_local: is("LOCAL_WORLD_SIZE", size),
                token: token(&[
                    "MASTER_ADDR",
                    "MASTER_PORT",
                    "TORCHELASTIC_RUN_ID",
                    "TORCHELASTIC_RESTART_COUNT",
                ]),
            })
        }
        Launcher::Slurm => {
            let nodes = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"];
            let list = nodes.iter().find_map(|name| variable(name)).unwrap_or_default();
            let host = first_host(&list).ok_or_else(|| invalid(nodes[0]))?;
            let number = |name| variable(name).and_then(|it| it.parse::<u64>().ok()).unwrap_or(0);
            let job = number("SLURM_JOB_ID").wrapping_add(number("SLURM_STEP_ID"));
            Way::Meeting(MeetingPoint {
                host,
                // Below the ports that Linux gives to sockets without one.
                port: 20000 + (job % 12000) as u16,
                is_local: is("SLURM_STEP_NUM_NODES", 1),
                token: token(&["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]),
            })
        }
    }))
}

/// The first host of Slurm's list: `gpu03` of `gpu[03-05,9],login`.
fn first_host(list: &str) -> Option<String> {
    let (name, rest) = match list.find(['[', ',']) {
        None => (list, ""),
        Some(at) => list.split_at(at),
    };
    let number = rest
        .strip_prefix('[')
        .map_or("", |rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default());
    let host = format!("{name}{number}");
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(variables: &[(&str, &str)]) -> anyhow::Result<Option<LaunchPlace>> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        LaunchPlace::from_variables(|name| find(name).map(|(_, value)| (*value).to_string()))
    }

    #[test]
    fn launchers_are_known_by_their_variables_and_must_agree() {
        assert_eq!(detect(&[]).unwrap(), None);
        // A shell of sbatch or salloc, and a step of one task.
        assert_eq!(detect(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")]).unwrap(), None);
        let step = [("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")];
        assert_eq!(detect(&step).unwrap(), None);
        // Not torchrun's.
        assert_eq!(detect(&[("RANK", "1"), ("WORLD_SIZE", "2")]).unwrap(), None);
        let mpich = [("PMI_RANK", "1"), ("PMI_SIZE", "4")];
        let place = detect(&mpich).unwrap().unwrap();
        let expected = (Launcher::Mpi(MpiFamily::Mpich), 1, 4);
        assert_eq!((place.launcher, place.rank, place.size), expected);
        let torchrun = [
            ("RANK", "1"),
            ("WORLD_SIZE", "4"),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", "29500"),
        ];
        let alone = detect(&torchrun).unwrap().unwrap();
        let Some(Way::Meeting(meeting)) = alone.way else { panic!("{alone:?}") };
        assert_eq!(
            (meeting.host.as_str(), meeting.port, meeting.is_local),
            ("localhost", 29501, false)
        );
        assert!(detect(&torchrun[..3]).unwrap_err().to_string().contains("MASTER_PORT"));
        let both = detect(&[torchrun.as_slice(), &mpich].concat()).unwrap().unwrap();
        assert_eq!(both.launcher, Launcher::Mpi(MpiFamily::Mpich));
        let other = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let said = detect(&[mpich.as_slice(), &other].concat()).unwrap_err().to_string();
        assert!(said.contains("PMI_SIZE says process 1 of 4"), "{said}");
        assert!(said.contains("OMPI_COMM_WORLD_SIZE says process 1 of 2"), "{said}");
        // What --gpus starts inherits the variables of what started it.
        let own = [("LAAM_RANK", "1"), ("LAAM_WORLD_SIZE", "2"), ("LAAM_SOCKETS", "7,-")];
        let place = detect(&[own.as_slice(), &mpich].concat()).unwrap().unwrap();
        assert_eq!((place.launcher, place.rank, place.size), (Launcher::Gpus, 1, 2));
        assert_eq!(place.way, Some(Way::Streams(vec![Some(7), None])));
        let few = [own[0], ("LAAM_WORLD_SIZE", "3"), own[2]];
        assert!(detect(&few).unwrap_err().to_string().contains("LAAM_SOCKETS"));
        let slurm = [
            ("SLURM_PROCID", "5"),
            ("SLURM_STEP_NUM_TASKS", "8"),
            ("SLURM_STEP_NODELIST", "gpu[03-04]"),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_JOB_ID", "1020000"),
        ];
        let place = detect(&slurm).unwrap().unwrap();
        let Some(Way::Meeting(meeting)) = place.way else { panic!("{place:?}") };
        assert_eq!((meeting.host.as_str(), meeting.port), ("gpu03", 20000));
        for (list, host) in [("a-b,c", "a-b"), ("n7", "n7"), ("x[1,3-4]-y", "x1")] {
            assert_eq!(first_host(list).as_deref(), Some(host));
        }
        for wrong in
            [[("PMI_RANK", "4"), ("PMI_SIZE", "4")], [("PMI_RANK", "x"), ("PMI_SIZE", "4")]]
        {
            assert!(detect(&wrong).unwrap_err().to_string().contains("PMI_RANK"));
        }
    }
}
