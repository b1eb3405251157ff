//! A machine's life on one host: started, adopted, stopped, let go of, forgotten.

mod disks;
mod disown;
mod error;
mod forget;
mod in_use;
mod ran;
mod start;
mod stop;
mod taps;

pub use disks::{has_own_disks, own_disks};
pub use disown::{DisownError, disown};
pub use error::{RunError, for_where};
pub use forget::{Forgotten, ended, forget, forget_decided, forget_incomplete, session_over};
pub use ran::{NEVER_RAN, Ran, has_run, may_never_have_run, may_run_here, runs_here};
pub use start::{adopt, run};
pub use stop::{Stopped, stop};
pub use taps::raise_taps;
