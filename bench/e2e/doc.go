// Package e2e holds the end-to-end tests of gmgate: the daemon as a process, phones with their own security layer on
// one side and an IMS core on the other, in the network of package lab, with a tap on the Gm link.
//
// The tests need root. They run with the ESP backend that GMGATE_E2E_BACKEND names (userspace, the default, xfrm or
// auto) against phones whose ESP is done by GMGATE_E2E_UE (userspace, the default, or xfrm). GMGATE_BINARY is the
// daemon; without it the tests build it. Compiled with `go test -c` the suite is a static program that also runs in a
// virtual machine without Go, if GMGATE_BINARY is given. REQUIRE_KERNEL_TESTS=1 turns skips into failures. With
// GMGATE_E2E_SLOW=1 tests with much traffic do with less of it.
//
// Every test makes a network of its own and checks at its end what holds for all of them: nothing but registrations
// was seen in clear, the core found nothing wrong with any message that reached it, no SA set is left, and the daemon
// ends in good order.
package e2e
