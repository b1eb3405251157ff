//! What every handler of the API needs.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::vms::Vms;

/// What every handler needs.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    pub(crate) vms: Vms,
    pub(crate) link: Arc<str>,
    pub(crate) started_unix_ms: u64,
    /// Ends every stream.
    pub(crate) closing: CancellationToken,
}
