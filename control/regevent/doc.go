// Package regevent is the P-CSCF's subscription to the registration state of one UE: its state machine, and the SIP
// messages of its dialog (TS 24.229 §5.2.3, RFC 3680, RFC 6665).
//
// The state machine knows nothing of SIP. It is one table of which event is legal in which state and where it leads;
// Next is a pure function of a Subscription, an Event and the time that returns the new Subscription and Actions, which
// the caller carries out: messages to send, timers to arm, a document to apply. docs/subscription.md shows the table. The
// Dialog is the other half: it builds the messages and reads what comes in into Events.
//
// How the parts are used:
//
//	SUBSCRIBE   Action Subscribe: NewDialog unless InDialog, and reginfo.Tracker.Restart; send Dialog.Subscribe. The
//	            transaction is the caller's: its end is an Event Accepted, Refused (ReadAnswer) or TimedOut, once, and
//	            only for the newest SUBSCRIBE.
//	NOTIFY      Dialog.Notify; a verdict other than Process is answered at once and does not reach the machine. Else its
//	            Event, with the Body that parsing has shown, goes to Next. A document that Apply finds to be incomplete
//	            is an Event Gap, after all actions of the NOTIFY are done.
//	timers      one each; when it fires, its Event.
//
// Invariants:
//
//   - Nothing is ever subscribed for an emergency registration (TS 24.229 §5.2.10).
//   - A notifier that misbehaves cannot make us send fast. Failures in a row are bounded by Config.MaxFailures, and the
//     delay between attempts doubles; only the first attempt after a subscription that has lasted, and one that asks for
//     the longer expiry which a 423 demands, come (almost) at once. Refreshes lie Config.MinRefresh apart, those because
//     of lost documents Config.GapInterval.
//   - Only timers that belong to a state run in it; Stop actions see to that.
//   - An event that the table does not have for a state changes nothing but Action Unexpected, and every NOTIFY is
//     answered all the same.
//   - Messages are built from values that hold no line breaks: nothing that was received can add a header field.
//
// Concurrency: no package state, no goroutines, no locks. Everything of one UE runs on its worker's loop. The only source
// of randomness is Config.Jitter.
package regevent
