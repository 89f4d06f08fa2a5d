//! What started this process, by its environment, and the group that it joins.

use super::Group;
use super::mpi::{self, MpiFamily};
use crate::error;

/// A program that starts the processes of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// PyTorch's `torchrun`, or `--gpus`.
    Torchrun,
    /// An MPI library's.
    Mpi(MpiFamily),
    /// `srun` without an MPI of its own.
    Slurm,
}

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
}

/// Launchers in the order of precedence, each with its variables of rank and size.
const LAUNCHERS: [(Launcher, &str, &str); 4] = [
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
            found.push(Self { launcher, rank, size, size_variable });
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
        // Where the same place has an MPI, its library is there.
        let with_mpi = found.iter().find(|place| matches!(place.launcher, Launcher::Mpi(_)));
        Ok(Some(with_mpi.unwrap_or(first).clone()))
    }

    /// For people: `mpiexec (MPICH), process 1 of 4`.
    pub fn describe(&self) -> String {
        let launcher = match self.launcher {
            Launcher::Torchrun => "torchrun",
            Launcher::Mpi(MpiFamily::OpenMpi) => "mpirun of Open MPI",
            Launcher::Mpi(MpiFamily::Mpich) => "mpiexec of MPICH",
            Launcher::Slurm => "srun",
        };
        format!("{launcher}, process {} of {}", self.rank, self.size)
    }

    /// Joins the other processes.
    ///
    /// # Errors
    /// No library to do it with, or one that sees another number of processes.
    pub fn join(&self) -> anyhow::Result<Group> {
        if self.size == 1 {
            return Ok(Group::alone());
        }
        let family = match self.launcher {
            Launcher::Mpi(family) => family,
            Launcher::Slurm => MpiFamily::Mpich,
            Launcher::Torchrun => {
                return Err(error::config(
                    format!(
                        "{}: its processes meet through NCCL, which this laam cannot use",
                        self.describe()
                    ),
                    "start the processes by mpiexec: mpiexec -n N laam train ...",
                ));
            }
        };
        let ranks = mpi::MpiRanks::start(family)?;
        let world = super::Ranks::world(&ranks).clone();
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
        let torchrun = [("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "localhost")];
        let both = detect(&[torchrun.as_slice(), &mpich].concat()).unwrap().unwrap();
        assert_eq!(both.launcher, Launcher::Mpi(MpiFamily::Mpich));
        let other = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let said = detect(&[mpich.as_slice(), &other].concat()).unwrap_err().to_string();
        assert!(said.contains("PMI_SIZE says process 1 of 4"), "{said}");
        assert!(said.contains("OMPI_COMM_WORLD_SIZE says process 1 of 2"), "{said}");
        for wrong in
            [[("PMI_RANK", "4"), ("PMI_SIZE", "4")], [("PMI_RANK", "x"), ("PMI_SIZE", "4")]]
        {
            assert!(detect(&wrong).unwrap_err().to_string().contains("PMI_RANK"));
        }
    }
}
