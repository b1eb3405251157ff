//! Peers with a good certificate that keep to the protocol up to each message, and then lie.

mod destination;
mod liar;
mod played;
mod post_copy;
mod source;
