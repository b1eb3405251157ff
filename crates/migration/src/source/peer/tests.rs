use super::super::settlement::withdraw;
use super::*;
use host::Origin;
use ownership::{Outgoing, Standing};
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

/// What comes of it that a destination says these in turn when it is told to throw a copy away; with none it says nothing more.
async fn withdrawn(words: &[Option<Reply>]) -> Withdrawal {
    let hosts = Hosts::new().await;
    let (source, address) = (LinkedHost::of(hosts.a.clone()), hosts.address());
    let (destination, connection) = tokio::join!(Destination::connect(&source, &address), hosts.accept());
    let Ok(mut destination) = destination else { panic!("no connection") };
    let (mut sender, mut receiver) = connection.0.split();
    let says = async {
        let asked = receiver.receive::<ToDestination>().await.unwrap().request;
        assert!(matches!(asked, Some(Request::Cancel(_))), "{asked:?}");
        for word in words {
            let Some(reply) = word else { return std::future::pending().await };
            sender.send(&wire::ToSource { reply: Some(reply.clone()) }).await.unwrap();
        }
        // It closes.
        drop((sender, receiver));
        std::future::pending().await
    };
    tokio::select! {
        withdrawal = destination.cancel(wire::Commit::default(), Duration::from_secs(2)) => withdrawal,
        () = says => unreachable!("it never ends"),
    }
}

#[tokio::test]
async fn a_copy_is_gone_only_when_its_own_destination_has_said_so() {
    let nothing = || wire::Nothing {};
    let finding = |kind: &str| Finding::new(kind, "words", "hint");
    let failed = |kinds: &[&str]| {
        let findings: Vec<Finding> = kinds.iter().map(|kind| finding(kind)).collect();
        Some(Reply::Failed(findings.into()))
    };
    let cancelled = || Some(Reply::Cancelled(nothing()));
    for (words, is) in [
        (vec![cancelled()], Withdrawal::Done),
        (vec![failed(&[kind::NO_COPY])], Withdrawal::Done),
        (vec![failed(&[kind::UNKNOWN_COPY])], Withdrawal::Unknown),
        (vec![Some(Reply::Running(wire::Running::default()))], Withdrawal::RunsThere),
        // What was on its way already is not the answer.
        (vec![Some(Reply::Ready(nothing())), cancelled()], Withdrawal::Done),
        // Whatever else has failed, the copy may be there.
        (vec![failed(&["mirror"]), cancelled()], Withdrawal::Unheard),
        (vec![failed(&[])], Withdrawal::Unheard),
        (vec![failed(&[kind::BUSY])], Withdrawal::Unheard),
        (vec![failed(&[kind::RECORD_UNREADABLE])], Withdrawal::Unheard),
        // Who does not know what it has of the machine says nothing else of it.
        (vec![failed(&[kind::NO_COPY, kind::BUSY])], Withdrawal::Unheard),
        (vec![failed(&[kind::UNKNOWN_COPY, kind::RECORD_UNREADABLE])], Withdrawal::Unheard),
        (vec![Some(Reply::Refused(vec![finding(kind::NO_COPY)].into()))], Withdrawal::Unheard),
        (vec![Some(Reply::Refused(wire::Findings::default()))], Withdrawal::Unheard),
        (vec![], Withdrawal::Unheard),
        (vec![None], Withdrawal::Unheard),
    ] {
        assert_eq!(withdrawn(&words).await, is, "{words:?}");
    }
}

#[tokio::test]
async fn another_agent_at_the_address_of_a_copy_is_not_asked_to_throw_it_away() {
    let hosts = Hosts::new().await;
    let (source, address) = (LinkedHost::of(hosts.a.clone()), hosts.address());
    let record = Record::new("web1".parse().unwrap(), Standing::own(), Origin::Run);
    let outgoing = |to: &str| Outgoing {
        session: Uuid::from_u128(7),
        to: Some(to.to_owned()),
        address: address.clone(),
    };
    for (to, is_asked) in [("host-c", false), ("host-b", true)] {
        let outgoing = outgoing(to);
        let answers = async {
            let (control, _) = hosts.accept().await;
            let (mut sender, mut receiver) = control.split();
            let Ok(asked) = receiver.receive::<ToDestination>().await else { return false };
            assert!(matches!(asked.request, Some(Request::Cancel(_))), "{asked:?}");
            sender.send(&wire::ToSource { reply: Some(Reply::Cancelled(wire::Nothing {})) }).await.unwrap();
            true
        };
        let (withdrawal, asked) = tokio::join!(withdraw(&source, &record, &outgoing), answers);
        let is = if is_asked { Withdrawal::Done } else { Withdrawal::Unheard };
        assert_eq!((withdrawal, asked), (is, is_asked), "{to}");
    }
}
