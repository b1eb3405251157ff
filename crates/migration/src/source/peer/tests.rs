use super::*;
use testing::Hosts;

impl Words for mpsc::Receiver<Reply> {
    async fn word(&mut self, limit: Duration, _: &str) -> Result<Reply, Stop> {
        let word = timeout(limit, self.recv()).await.ok().flatten();
        word.ok_or_else(|| lost(LinkError::Closed))
    }
}

/// Says so many times that it is at it, so many seconds apart, and then that it has reserved. Returns how long that was waited for,
/// and whether it was heard.
async fn reserved(times: u64, apart: u64) -> (u64, bool) {
    let (tell, mut inbox) = mpsc::channel(1);
    let destination = tokio::spawn(async move {
        for _ in 0..times {
            tokio::time::sleep(Duration::from_secs(apart)).await;
            if tell.send(Reply::Working(wire::Nothing {})).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(Duration::from_secs(apart)).await;
        let _ = tell.send(Reply::Reserved(wire::Reserved::default())).await;
    });
    let begin = Instant::now();
    let heard = matches!(patiently(&mut inbox, begin + RESERVE).await, Ok(Reply::Reserved(_)));
    destination.abort();
    (begin.elapsed().as_secs(), heard)
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_is_at_it_is_waited_for_and_one_that_says_nothing_is_not() {
    assert_eq!(reserved(0, 59).await, (59, true));
    assert_eq!(reserved(0, 61).await, (60, false));
    assert_eq!(reserved(59, 15).await, (900, true), "a huge VM, and a slow hook");
    assert_eq!(reserved(2, 61).await, (60, false));
    assert_eq!(reserved(1_000_000, 15).await, (1200, false), "for ever is too long");
}

#[tokio::test(start_paused = true)]
async fn a_destination_whose_qemu_is_never_ready_for_post_copy_is_not_waited_for_for_ever() {
    let (_tell, mut inbox) = mpsc::channel(1);
    let begin = Instant::now();
    let heard = timeout(Duration::from_secs(3600), ready_for_post_copy(&mut inbox)).await;
    assert!(matches!(heard, Ok(Err(_))), "{heard:?}");
    assert_eq!(begin.elapsed().as_secs(), POST_COPY_READY.as_secs());
}

#[tokio::test]
async fn a_destination_that_takes_nothing_keeps_no_guest_paused() {
    let hosts = Hosts::new().await;
    let (source, address) = (LinkedHost::of(hosts.a.clone()), hosts.address());
    let (destination, connection) = tokio::join!(Destination::connect(&source, &address), hosts.accept());
    let Ok(destination) = destination else { panic!("no connection") };
    // More than all buffers on the way hold, to somebody who reads none of it.
    let neighbour = |_| wire::Neighbour { mac: "0".repeat(8192), ..wire::Neighbour::default() };
    let known = wire::Known { neighbours: (0..100).map(neighbour).collect(), flows: None };
    tokio::time::pause();
    let begin = Instant::now();
    let Err(Stop::Failed(why)) = destination.tell_known(vec![known; 100]).await else {
        panic!("all of it was taken")
    };
    assert!(why.message.contains("did not take what is known"), "{why:?}");
    assert_eq!(begin.elapsed().as_secs(), KNOWN.as_secs());
    drop(connection);
}
