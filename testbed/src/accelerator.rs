//! What can run a guest's CPUs. Which of them does here is [found out](Accelerator::detect).

/// What runs a guest's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The machine's own CPUs.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accelerator {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|accelerator| accelerator.name() == name)
    }

    /// The CPU model that goes with it, where QEMU's own default is not the best.
    pub(crate) fn cpu(self) -> Option<&'static str> {
        match self {
            Self::Kvm => Some("host"),
            Self::Tcg => None,
        }
    }
}
