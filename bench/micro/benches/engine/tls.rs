//! The agents' own data connections: TLS 1.3 with certificates on both sides.

use std::sync::Arc;
use std::time::Duration;

use link::certificates;
use link::{
    AbortHandle, Bandwidth, DataReceiver, DataSender, Deadlines, Endpoint, Identity, Incoming, Listener,
};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use uuid::Uuid;

use crate::veth::{FAR_ADDRESS, VethPair, within};

/// Two agents' endpoints, and the runtime that greets for the far one.
pub(crate) struct Agents {
    _directory: TempDir,
    near: Endpoint,
    far: Endpoint,
    runtime: Arc<Runtime>,
}

/// Data connections: the near ends, what cuts each of them, and the far ends in the same order.
pub(crate) type Connected = (Vec<DataSender>, Vec<AbortHandle>, Vec<DataReceiver>);

impl Agents {
    pub(crate) fn new() -> Agents {
        let directory = tempfile::tempdir().unwrap();
        let ca = certificates::init(directory.path()).unwrap().certificate;
        let endpoint = |name: &str| {
            let files = certificates::issue(directory.path(), name, &[FAR_ADDRESS.to_owned()]).unwrap();
            let identity = Identity::load(&ca, &files.certificate, &files.key).unwrap();
            Endpoint::new(&identity, Deadlines::default()).unwrap()
        };
        let (near, far) = (endpoint("near"), endpoint("far"));
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Agents { _directory: directory, near, far, runtime: Arc::new(runtime) }
    }

    /// Opens data connections from the near namespace to the far one.
    pub(crate) fn connect(&self, pair: &VethPair, streams: u16) -> Connected {
        let (far, runtime) = (self.far.clone(), Arc::clone(&self.runtime));
        let listener = within(&pair.far, move || {
            runtime.block_on(Listener::bind(&far, &format!("{FAR_ADDRESS}:0"))).unwrap()
        });
        let address = listener.local_addr().to_string();
        let (mut near, mut aborts, mut far) = (Vec::new(), Vec::new(), Vec::new());
        for stream in 0..streams {
            let (endpoint, address) = (self.near.clone(), address.clone());
            let sender = within(&pair.near, move || {
                endpoint.open_data(&address, Uuid::nil(), stream, Bandwidth::new(None)).unwrap()
            });
            let accepted = async { tokio::time::timeout(Duration::from_secs(10), listener.accept()).await };
            match self.runtime.block_on(accepted).unwrap().unwrap() {
                Incoming::Data(receiver, ..) => far.push(receiver),
                Incoming::Control(..) => unreachable!("a data connection was opened"),
            }
            aborts.push(sender.abort_handle().unwrap());
            near.push(sender);
        }
        (near, aborts, far)
    }
}
