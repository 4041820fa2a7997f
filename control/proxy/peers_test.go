package proxy

import (
	"fmt"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// peerRow is one case that another P-CSCF gets wrong, or that its users ask for, and what shows that gmgate gets it right.
// The cases were found by running and reading those systems and by reading what is reported about them.
type peerRow struct {
	id   string // part, section and row; a letter where a row has several cases
	says string // what gmgate does
	run  func(*testing.T)
	see  string // tests of other packages, "package:Test" or "package:Test/part", with real packets, sockets or files
}

// Part A: the P-CSCF module for IPsec of Kamailio.
var kamailio = []peerRow{
	// A1: area by area.
	{"A1.01", "three hundred phones share six protected ports", peerCrowdOnFewPorts, "dataplane/front:TestPlaceholders"},
	{"A1.02", "whoever finds no room gets an error, never a challenge without Security-Server", peerExhaustion, ""},
	{"A1.03a", "no SPI has two owners, and one set is released once", peerOneRemoval, "control/sa:TestSPIPool"},
	{"A1.03b", "SPIs cannot be foretold", nil, "control/sa:TestSPIPoolIsUnpredictable"},
	{"A1.03c", "SPIs come back and are found at once, however many are taken", peerSPIsComeBack, "control/sa:TestSPIPoolProbes"},
	{"A1.03d", "workers share no allocator, so no lock can hang a REGISTER storm", nil, "control/sa:TestSplit, dataplane/front:TestTwoWorkers"},
	{"A1.03e", "SPIs that the kernel knows from others are not given out", nil, "control/sa:TestSPIPoolReserve"},
	{"A1.04a", "REGISTERs that nobody authenticates leave the pools whole", TestFloodOfSources, "control/proxy:TestFlood, bench/e2e:TestFloodEndToEnd"},
	{"A1.04b", "challenged ones that never come back neither", TestFloodOfChallenges, ""},
	{"A1.05a", "an SA that the kernel refuses is an error, not a success", TestBackendRefuses, "dataplane/xfrm:TestKernelErrors, dataplane/xfrm:TestGuestRollback"},
	{"A1.05b", "a first REGISTER may come from any port", peerInitialFromAnyPort, ""},
	{"A1.05c", "a re-registration is told by its SA and not by a port", peerStateNotFromPort, ""},
	{"A1.05d", "CK and IK leave the challenge without a script", peerKeysStripped, "control/aka:TestTake"},
	{"A1.05e", "Security-Server can offer every mechanism, with falling q", peerServerList, "control/secagree:TestServerSuites"},
	{"A1.06", "a registration touches no SA of other phones", peerNeighboursUntouched, "dataplane/xfrm:TestGuestForeign"},
	{"A1.07", "four SAs, each with its own SPI, for every transport", peerFourSAs, "dataplane/xfrm:TestGuestSuites, dataplane/xfrm:TestTrafficTCP"},
	{"A1.08a", "constant policies with a mark of ours; those of others stay", nil, "dataplane/xfrm:TestPolicies, dataplane/xfrm:TestGuestForeign"},
	{"A1.08b", "a second daemon in the namespace disturbs nothing", nil, "dataplane/xfrm:TestGuestInUse"},
	{"A1.08c", "cleartext to protected ports dies in the kernel", nil, "dataplane/xfrm:TestTrafficClear"},
	{"A1.09a", "every SA has a hard limit in the kernel a little beyond ours", peerKernelLifetimes, "dataplane/xfrm:TestGuestExpiry, dataplane/xfrm:TestGuestExtend"},
	{"A1.09b", "when the kernel ends a set we know", TestBackendExpires, "dataplane/xfrm:TestGuestExpired"},
	{"A1.10", "answers to requests without Contact leave inside the SA", peerAnswersWithoutContact, ""},
	{"A1.11", "what goes to a phone leaves from port-pc", peerPorts, ""},
	{"A1.12", "beside its old set a phone is reached over the right one", TestReregistration, "bench/e2e:TestReregisterUnderLoad"},
	{"A1.13", "neither Request-URI nor alias leads out of the SA", peerTargetFromSA, ""},
	{"A1.14", "the Request-URI arrives as it was sent", peerTargetFromSA, ""},
	{"A1.15", "the phone's own connection carries requests to it", peerRegisterOverTCP, ""},
	{"A1.16", "transport to a phone is the one that it registered over", peerConnectsFromPC, ""},
	{"A1.17", "an answer goes by the transport of its request", peerBothTransports, ""},
	{"A1.18", "where a phone takes no TCP the request goes by UDP with the right Via", peerFallsBackToUDP, ""},
	{"A1.19", "settings have names and limits, and a bad one is an error", peerSettings, "control/config:TestBad"},
	{"A1.20", "a set that has ended cannot take its SPIs from the next owner", peerOneRemoval, ""},
	{"A1.21", "timer and release in the same moment end a set once", peerTimerAndRelease, ""},
	{"A1.22a", "a killed daemon comes back to all its SAs, and the phones notice nothing", TestRestart, "bench/e2e:TestRestart, control/survive:TestAdopted, dataplane/xfrm:TestGuestAdopt"},
	{"A1.22b", "what has no owner any more goes, and only what is ours", nil, "bench/e2e:TestRestartOrphans, control/survive:TestMixed, dataplane/xfrm:TestGuestForeign"},
	{"A1.22c", "a clean stop leaves the phones their SAs", nil, "dataplane/xfrm:TestDetach, dataplane/xfrm:TestGuestDetach"},
	{"A1.23", "SAs end 30 seconds after their registration, not an hour", peerExpiry, ""},
	{"A1.24", "the 200 to a de-REGISTER arrives inside the SA, and both sets go afterwards", peerDeregistrationAfterRenewal, ""},
	{"A1.25a", "the server port stays through re-registrations, the client port changes", peerManyRenewals, ""},
	{"A1.25b", "the old set goes 64*T1 after the new one is used", peerOldSetUntilNewIsUsed, "control/registrar:TestHandOverByTime"},
	{"A1.25c", "a re-registration without Security-Client keeps its set", peerRefreshWithoutOffer, ""},
	{"A1.26", "one phone's Security-Verify cannot name another phone's SAs", peerForeignVerify, "control/proxy:TestHostilePhones, bench/e2e:TestHostilePhones"},
	{"A1.27a", "ipsec-3gpp need not be the first mechanism", peerOtherMechanismFirst, ""},
	{"A1.27b", "without ealg there is no encryption; without alg there is no agreement", peerMissingParameters, "control/secagree:TestParseFields"},
	{"A1.27c", "blanks are allowed where the grammar has them", peerSpaces, "control/secagree:TestParseForms"},
	{"A1.28a", "our preference decides over the whole offer", peerOwnPreference, "control/secagree:TestSelect"},
	{"A1.28b", "integrity and encryption of two entries are never mixed", peerNeverMixed, ""},
	{"A1.29a", "every pair of TS 33.203 Annex H works, aes-gcm and aes-gmac among them", TestEverySuite, "bench/e2e:TestSuites, dataplane/xfrm:TestTrafficSuites"},
	{"A1.29b", "what is unknown is refused, and never becomes null", peerUnknownAlgorithm, ""},
	{"A1.30a", "keys of the wrong length are an error", peerKeyLengths, "control/aka:TestTakeErrors"},
	{"A1.30b", "keys are wiped with their set, and print nowhere", peerKeysWiped, "control/aka:TestKeysAreNeverPrinted, control/ims:TestKeysNeverPrint"},
	{"A1.30c", "keys in the store are sealed", nil, "control/store:TestSealing"},
	{"A1.31a", "a lost connection is replaced inside the SA", peerConnectionLostInDialog, "bench/e2e:TestConnectionGone"},
	{"A1.31b", "the Via of a request to a phone names port-ps", peerOwnAddresses, ""},
	{"A1.32", "an IPv6 address is the same however it is spelled", TestIPv6, "bench/e2e:TestLife"},
	{"A1.33", "UDP-enc-tun is refused by name instead of being taken for transport mode", peerTunnelModes, ""},
	{"A1.34", "a slow backend or core holds up nobody else", peerNobodyWaits, "dataplane/xfrm:TestBatch"},
	{"A1.35", "what goes wrong is counted, and each phone can be looked at", peerCounted, "control/observe:TestCountersAreAddedUp, bench/e2e:TestOperator"},

	// A2: TCP over ESP.
	{"A2.01", "a protected REGISTER over TCP has its answer on the same connection", peerRegisterOverTCP, "bench/e2e:TestLife"},
	{"A2.02", "a MESSAGE to a phone that registered over TCP goes over TCP", peerConnectsFromPC, ""},
	{"A2.03", "a connection that is lost within a dialog is opened again", peerConnectionLostInDialog, "bench/e2e:TestConnectionGone"},

	// A3: gaps against 3GPP.
	{"A3.01", "Security-Verify must be what was sent", peerVerifyEveryParameter, "bench/e2e:TestAgreementViolations"},
	{"A3.02", "Security-Client must be repeated", TestProtectedRegisterRefused, ""},
	{"A3.03a", "SPIs differ from each other and from the phone's", peerSPIRange, ""},
	{"A3.03b", "a phone has six SAs per direction at most", peerMaxSets, ""},
	{"A3.04a", "a temporary set has its own timer", peerAwaitAuth, "control/registrar:TestAwaitAuth"},
	{"A3.04b", "the old set is shortened by the first use of the new one", peerOldSetUntilNewIsUsed, ""},
	{"A3.05a", "nothing but REGISTER is taken in clear", TestUnprotected, "bench/e2e:TestStrangerTraffic"},
	{"A3.05b", "an address proves nothing, an SA does", peerTupleNotAddress, ""},
	{"A3.05c", "a REGISTER in clear takes nothing from a registered phone", peerClearRegisterOfRegistered, ""},
	{"A3.05d", "integrity-protected says what was, not what the phone claims", peerIntegrityClaim, "control/aka:TestSetIntegrityProtected"},
	{"A3.06a", "494, 421, 420 and 400, each with all our mechanisms where it must", peerRefusalCodes, "bench/e2e:TestStrangerRegister"},
	{"A3.06b", "the core sees no trace of the agreement", peerAgreementStaysHere, ""},
	{"A3.07a", "aes-gcm and aes-gmac with salts of Annex I", peerAEAD, "control/aka:TestExpand, dataplane/esp:TestPacketVectors"},
	{"A3.07b", "md5 and 3des can be switched off", peerDeprecatedStayOff, ""},
	{"A3.08", "ports and SPIs of the phone are checked, also beyond 16 and 32 bits", peerSanity, "control/secagree:TestParseErrors"},
	{"A3.09", "keys leave in no answer, whatever becomes of it", peerKeysStrippedAlways, "bench/e2e:TestChallengeForms"},
	{"A3.10a", "several contacts, of which one goes", TestContactReplaced, ""},
	{"A3.10b", "an emergency registration has its SAs", peerEmergency, ""},

	// A4: what hurts users.
	{"A4.01a", "no message makes it crash", peerGarbage, "bench/e2e:TestHostileRequests"},
	{"A4.01b", "phones that come and go leave nothing behind", peerNothingRemains, ""},
	{"A4.02", "TCP from the right port, within the SA, with the right transport", peerConnectsFromPC, "dataplane/xfrm:TestTrafficTCP"},
	{"A4.03", "no flags: ports and transports follow from TS 33.203", peerPorts, ""},
	{"A4.04a", "a phone that restarts replaces its set", peerRebootSamePorts, "bench/e2e:TestAgreementViolations/reboot (T11)"},
	{"A4.04b", "a re-registration that fails costs nothing", peerFailedRenewals, "bench/e2e:TestAgreementViolations/wrong RES in a re-registration"},
	{"A4.04c", "a restart of the daemon costs nothing, a reboot of the machine neither", TestRestart, "bench/e2e:TestRestart, control/survive:TestReinstalled, dataplane/xfrm:TestGuestReboot"},
	{"A4.05", "the 200 to a de-REGISTER arrives", TestDeregistration, ""},
	{"A4.06", "client ports do not run out", peerManyRenewals, ""},
	{"A4.07", "port 5060 means nothing", peerInitialFromAnyPort, "bench/e2e:TestHandsets"},
	{"A4.08", "ports are never swapped", peerFourSAs, "dataplane/xfrm:TestTrafficSuites, bench/e2e:TestSuites"},
	{"A4.09", "a long list with md5 and 3des first gets what we prefer", peerSeveralMechanismsOfSamsung, ""},
	{"A4.10", "IPsec can be asked for, allowed or forbidden, phone by phone", TestPolicyModes, ""},
	{"A4.11a", "CK and IK never reach the phone", peerKeysStripped, ""},
	{"A4.11b", "a core that sends no keys is named as the cause", TestChallengeWithoutKeys, ""},
	{"A4.12", "wrong keys show as ESP that fails its check, a wrong SIM as 403", peerCounted, "dataplane/esptun:TestInboundDrops, bench/e2e:TestESPAttacks"},
	{"A4.13a", "a phone behind a NAT is told apart by its Via, and told why", peerBehindNAT, ""},
	{"A4.13b", "missing privileges and a kernel without ESP are found at the start", nil, "dataplane/xfrm:TestProbe, dataplane/xfrm:TestNewWithoutESP"},
	{"A4.14", "sec-agree does not reach the trunk", peerAgreementStaysHere, ""},
	{"A4.15", "a clean start is quiet", nil, "dataplane/xfrm:TestQuietStart"},
	{"A4.16", "the core learns from Via where the phone is", peerViaForCore, ""},
	{"A4.17a", "Samsung: six pairs, null last", peerSeveralMechanismsOfSamsung, "control/secagree:TestHandsets"},
	{"A4.17b", "Xiaomi: no prot, no mod, blanks, SPIs above 2^31", peerXiaomi, ""},
	{"A4.17c", "port-c above port-s or below", peerPortOrder, ""},
	{"A4.17d", "alg first, null first", peerOwnPreference, ""},
	{"A4.17e", "Contact port unlike the source port, protected REGISTER over TCP", peerRegisterOverTCP, "bench/e2e:TestHandsets"},
	{"A4.17f", "a phone that is strict on ports", peerPorts, "bench/ue:TestLiveRegister"},
	{"A4.17g", "an idle phone that closes its connection stays registered", peerIdlePhoneStays, ""},
	{"A4.17h", "a phone may answer from port-us", peerPorts, ""},
}

// Part B: the modules of OpenSIPS for IPsec, AKA and TLS.
var opensips = []peerRow{
	// B1: area by area.
	{"B1.01", "metrics and commands for what the module does in the dark", TestInspect, "control/observe:TestCountersAreAddedUp, control/observe:TestLint, bench/e2e:TestOperator"},
	{"B1.02", "every parameter has its place and a default that works", peerSettings, "control/config:TestExampleIsTheDefault"},
	{"B1.03", "registered is who the core has said 200 to, and nobody else", peerAnswerWithoutTransaction, "control/registrar:TestStates"},
	{"B1.04", "UDP and TCP on one port, both address families", peerBothTransports, "dataplane/front:TestAddressInUse, dataplane/front:TestPlaceholders"},
	{"B1.05", "a request sent again over the other transport says so in Via", peerFallsBackToUDP, ""},
	{"B1.06", "an answer goes over the set of its request", peerAnswerOnSetOfRequest, ""},
	{"B1.07", "a request finds its phone by token, not by address", peerTwoAtOneAddress, ""},
	{"B1.08", "a REGISTER belongs to the phone of its SA", peerOtherIdentityOverSet, ""},
	{"B1.09", "every request is tied to an SA", peerTupleNotAddress, ""},
	{"B1.10", "the 401 leaves when the SAs stand, without keys and with Security-Server", TestRegistration, ""},
	{"B1.11a", "prot and mod are checked", peerTunnelModes, ""},
	{"B1.11b", "q has three decimals, and names no case", peerVerifyLayout, "control/secagree:TestQ"},
	{"B1.12", "every algorithm that is advertised works", TestEverySuite, "dataplane/xfrm:TestGuestSuites"},
	{"B1.13", "the SPI pool costs what is in use, and says when it is full", peerExhaustion, "control/sa:TestSPIPool"},
	{"B1.14", "SAs have a lifetime and a window of 256", peerKernelLifetimes, "dataplane/xfrm:TestGuestSuites, dataplane/xfrm:TestWindowFallback"},
	{"B1.15", "one netlink socket, every message acknowledged, sets in one call", nil, "dataplane/xfrm:TestBatch, dataplane/xfrm:TestLostAck"},
	{"B1.16", "every state has its table, and what is not in it changes nothing", nil, "control/sa:TestPhases, control/registrar:TestStates"},
	{"B1.17", "each temporary set ends at its own time", peerAwaitAuth, "control/wheel:TestModel"},
	{"B1.18", "every parameter of every entry of Security-Verify counts", peerVerifyEveryParameter, "control/secagree:TestEqual"},
	{"B1.19", "integrity-protected is quoted, yes or no", peerIntegrityClaim, ""},
	{"B1.20", "Via may bear a name, but only that of the phone, and only once", peerViaNames, ""},
	{"B1.21", "a refresh keeps its set, however its contact looks", TestRepeatedSM7, ""},
	{"B1.22", "every registration is kept, its keys sealed", TestWhatIsKept, "control/store:TestSealing, control/store:TestSecretsDoNotPrint"},
	{"B1.23", "a start compares store and kernel and makes them agree", TestMend, "bench/e2e:TestRestart, control/survive:TestMixed, dataplane/xfrm:TestGuestDetach"},
	{"B1.24", "two client ports do for re-registrations", peerManyRenewals, ""},
	{"B1.25", "IPv6", TestIPv6, "bench/e2e:TestLife"},
	{"B1.26", "494, 421 and 420", peerRefusalCodes, ""},

	// B2: the numbered defects.
	{"B2.01", "SAs outlive the transaction of their 200", peerSetOutlivesTransaction, ""},
	{"B2.02", "a REGISTER without Authorization", peerRegisterWithoutAuthorization, ""},
	{"B2.03", "the first REGISTER over IPv6", TestIPv6, "bench/e2e:TestLife"},
	{"B2.04", "the work for one phone does not grow with the others", peerNobodyWalks, ""},
	{"B2.05", "another phone of the same /8 leaves", peerSameEightLeaves, ""},
	{"B2.06", "aes-gcm and aes-gmac are installed as AEAD, with their salts", peerAEAD, "dataplane/xfrm:TestCipherTable, dataplane/xfrm:TestGuestSuites"},
	{"B2.07", "3DES has CK1, CK2, CK1", peerTripleDESKey, "control/aka:TestExpand"},
	{"B2.08", "errors of netlink are seen", TestBackendRefuses, "dataplane/xfrm:TestKernelErrors, dataplane/xfrm:TestRollback"},
	{"B2.09", "five hundred challenges leave one set", peerRepeatedChallenges, ""},
	{"B2.10", "same ports, new SPIs", peerRebootSamePorts, "dataplane/xfrm:TestPolicies"},
	{"B2.11", "two protected REGISTERs without Security-Verify", peerTwiceWithoutVerify, ""},
	{"B2.12", "contexts of phones that have left are gone", peerNothingRemains, ""},
	{"B2.13", "two subscribers at one address", peerTwoAtOneAddress, ""},
	{"B2.14", "a request to port-ps without an SA", peerTupleNotAddress, "dataplane/xfrm:TestTrafficClear, bench/e2e:TestStrangerTraffic"},
	{"B2.15", "without an SA nothing is sent", peerNeverInClear, "dataplane/xfrm:TestTrafficNoSA, dataplane/esptun:TestNothingLeavesInClear"},
	{"B2.16a", "re-registrations leave one set", peerManyRenewals, ""},
	{"B2.16b", "a plain refresh keeps the set", peerRefreshWithoutOffer, ""},
	{"B2.17", "several addresses of record over one set", peerSeveralAoRs, ""},
	{"B2.18a", "an answer that nobody waits for registers nobody", peerAnswerWithoutTransaction, ""},
	{"B2.18b", "what is restored is what it was", TestRestart, "control/store:TestCodecKeepsEveryField"},
	{"B2.19a", "ck and ik last in the challenge leave no comma", peerKeysStripped, "control/aka:TestTake"},
	{"B2.19b", "ck and ik go, also where no SA is made", peerKeysStrippedAlways, ""},
	{"B2.20", "release and timer cannot lock each other out", peerTimerAndRelease, ""},
	{"B2.21a", "no SPI beyond the last", peerSPIRange, "control/sa:TestSPIPool"},
	{"B2.21b", "integrity-protected=no fits its place", peerIntegrityClaim, ""},
	{"B2.21c", "what is deprecated stays off after its first use", peerDeprecatedStayOff, ""},
	{"B2.22", "nothing is searched in a list of phones, sets or timers", peerNobodyWalks, "control/wheel:TestModel, control/sa:TestSPIPoolProbes"},

	// B3: what of 3GPP it does not do.
	{"B3.01a", "six SAs per direction and phone", peerMaxSets, ""},
	{"B3.01b", "address and port-uc have one owner", peerAddressTaken, "control/registrar:TestConflicts"},
	{"B3.02", "the lifetime of an SA is that of the registration, in the kernel as well", peerKernelLifetimes, "dataplane/xfrm:TestGuestExtend"},
	{"B3.03", "the old set is kept until the new one is used, and then shortened", peerOldSetUntilNewIsUsed, "bench/e2e:TestReregistration"},
	{"B3.04", "the first use selects the new set", TestReregistration, "control/registrar:TestReauthentication"},
	{"B3.05", "Security-Client and Security-Verify are checked", TestProtectedRegisterRefused, ""},
	{"B3.06", "sec-agree is taken out of Require and Proxy-Require", peerAgreementStaysHere, ""},
	{"B3.07", "494, 421 and 420", TestClearRegisterRefused, ""},
	{"B3.08", "reg-await-auth of four minutes, or as configured", peerAwaitAuthConfigured, ""},
	{"B3.09", "UDP-enc-tun is not taken for something else", peerTunnelModes, ""},
	{"B3.10", "integrity-protected=no", peerIntegrityClaim, ""},
	{"B3.11", "P-Asserted-Identity is what the SA says", TestAssertedIdentity, "bench/e2e:TestHostileRequests/identity of another phone (T8)"},
	{"B3.12", "Path is ours", peerPathAndNetwork, ""},
	{"B3.13", "P-Visited-Network-ID is ours", peerPathAndNetwork, ""},
	{"B3.14", "a phone cannot get round its Service-Route", peerServiceRoute, ""},
	{"B3.15", "the core ends a registration by NOTIFY", TestDeregisteredByCore, "control/regevent:TestLife, bench/e2e:TestNetworkDeregistration"},
	{"B3.16", "emergency registrations", TestEmergencyRegistration, ""},
	{"B3.18", "AKAv2 and the other digests", peerOddChallenges, ""},
	{"B3.19", "an offer of tls alone is told what we can", peerOffersWithoutIPsec, ""},
	{"B3.20", "after a reboot sequence numbers go ahead of what the phone has seen", nil, "control/survive:TestReinstalled, control/sa:TestCounters, dataplane/xfrm:TestGuestReboot, dataplane/esptun:TestRestart, dataplane/useresp:TestRestart"},
	{"B3.21", "counters", peerCounted, "control/observe:TestCountersAreAddedUp"},

	// B4: AKA, as far as a front end sees it.
	{"B4.01", "a core that thinks holds up one phone only", peerNobodyWaits, ""},
	{"B4.02", "every algorithm of the challenge passes", peerOddChallenges, "bench/e2e:TestChallengeForms"},
	{"B4.03", "synchronisation failure", peerResync, "bench/e2e:TestAgreementViolations/sequence number failure (T18)"},
	{"B4.04", "IMPI and IMPU have nothing in common", peerIMPIUnlikeIMPU, ""},
	{"B4.05", "five hundred 401 leave nothing", peerRepeatedChallenges, ""},
	{"B4.06", "what the operator ends is ended", TestOperatorDeregisters, "control/admin:TestDeregister, bench/e2e:TestOperator"},
	{"B4.07", "every setting that is documented exists, and the other way round", nil, "control/config:TestSchemaIsDocumentedAndComplete"},
	{"B4.08", "a challenge without use is an error of the core", TestChallengeWithoutKeys, ""},
	{"B4.09", "an idle second walks over nobody", peerNobodyWalks, "control/wheel:TestModel"},
	{"B4.10", "what is replayed counts for nothing", TestRetransmission, "dataplane/esp:TestReplay, bench/e2e:TestESPAttacks"},
	{"B4.11", "the order of the challenge's parameters does not matter", peerKeysStripped, ""},

	// B5: TLS, as far as it holds for every connection.
	{"B5.02", "pongs", nil, "dataplane/front:TestPongs"},
	{"B5.03", "lone line ends", nil, "dataplane/front:TestTCPPong, dataplane/front:TestLoneCR"},
	{"B5.04", "a message in many pieces is bounded in size and work", nil, "dataplane/front:TestStreamFragments, dataplane/front:TestStreamLimit"},
	{"B5.05", "a connection is used by its own SA only", peerConnectionsAreBound, ""},
	{"B5.06", "a peer that does not answer holds up no other", nil, "dataplane/front:TestDialQueues"},
	{"B5.07", "what a peer does not read is bounded", nil, "dataplane/front:TestTCPOutboundCap, dataplane/front:TestOutboundTotal"},
	{"B5.11", "connections are counted", nil, "dataplane/front:TestStatsNames"},
}

// Part C: reports of users.
var reports = []peerRow{
	// C1: of OpenSIPS.
	{"C1.01", "several identities end one by one, the answer before the SAs", peerSeveralAoRs, ""},
	{"C1.02", "connections from port-pc beside a listener on it", nil, "dataplane/front:TestDial, bench/e2e:TestConnectionGone"},
	{"C1.03", "one local port to many peers", nil, "dataplane/front:TestDial"},
	{"C1.04", "SIP digest passes where the policy says so", TestDigestPassesThrough, "bench/e2e:TestPassThrough"},
	{"C1.06a", "every identity of P-Associated-URI is the phone's", TestSecondIMPU, ""},
	{"C1.06b", "the configuration that we print starts", nil, "control/config:TestExampleIsTheDefault, cmd/gmgate:TestDemo"},
	{"C1.07a", "md5 and 3des offered first", peerSeveralMechanismsOfSamsung, ""},
	{"C1.07b", "md5 and 3des offered only", peerTripleDESKey, "bench/e2e:TestSuites"},
	{"C1.08", "calls with PRACK and UPDATE both ways", peerCalls, "bench/e2e:TestLife"},
	{"C1.09", "a challenge that never ends is ended", peerEndlessChallenges, ""},
	{"C1.10", "connections: no blocking, limits of seconds, data right behind the opening", nil, "dataplane/front:TestDialQueues, dataplane/front:TestTCPFraming, dataplane/front:TestAcceptWithoutDescriptors"},

	// C2: of other systems for the same job.
	{"C2.01", "no crash at REGISTER", peerGarbage, ""},
	{"C2.02", "two phones, a call, and what comes after it", peerCalls, "bench/e2e:TestManyPhones"},
	{"C2.03", "netlink errors are read, and foreign SAs left alone", nil, "dataplane/xfrm:TestKernelErrors, dataplane/xfrm:TestGuestForeign"},
	{"C2.04", "client and server port in their places on the wire", peerFourSAs, "bench/e2e:TestLife"},
	{"C2.05", "no port of the phone is assumed", peerInitialFromAnyPort, ""},
	{"C2.06", "a new authentication vector makes a new set", peerNewVectorNewSet, ""},
	{"C2.07a", "the core sees the phone's address and port", peerViaForCore, ""},
	{"C2.07b", "and the phone's Via is held to its SA", peerViaNames, ""},
	{"C2.08", "who can do no IPsec passes where the policy says so", TestDigestPassesThrough, "bench/e2e:TestPassThrough"},
	{"C2.09", "an hour later: inside the SA or not at all", peerNeverInClear, "dataplane/front:TestTCPIdle, dataplane/front:TestProtectedReset"},
	{"C2.10", "NOTIFY to a phone over TCP", peerConnectsFromPC, ""},
	{"C2.11", "a phone that takes no TCP", peerFallsBackToUDP, "bench/e2e:TestConnectionGone"},
	{"C2.12", "a phone without Security-Client gets 421, or passes where the policy says so", TestPolicyModes, "bench/e2e:TestStrangerRegister"},
	{"C2.13", "NAT is seen and named", peerBehindNAT, ""},
	{"C2.14", "silence after the 401 has a counter, and each phone can be looked at", peerCounted, "dataplane/esptun:TestReasons, bench/e2e:TestESPAttacks"},
	{"C2.15", "IPv6 is no exception", TestIPv6, "bench/e2e:TestSuites"},
	{"C2.16", "UDP and TCP over one set", peerBothTransports, "dataplane/xfrm:TestTrafficTCP"},
	{"C2.17", "Security-Verify exact, 421 in clear, nothing of it at the core, one set", peerVerifyEveryParameter, ""},
	{"C2.18", "a phone to test with", nil, "bench/ue:TestLiveRegister, cmd/gmgate:TestDemo"},
}

// Part D: SIPhon and Ella IMS, which tell of their own mistakes and choices.
var siblings = []peerRow{
	// D1: what the history of SIPhon tells of.
	{"D1.01", "a phone that is idle for long stays registered", peerIdlePhoneStays, ""},
	{"D1.02", "the end of a connection is no de-registration", peerIdlePhoneStays, ""},
	{"D1.03", "what a restart left does not stand in the way of a registration", TestRestartUnfit, "bench/e2e:TestRestartOrphans, bench/e2e:TestRestartWithoutStore"},
	{"D1.04", "a 401 that is repeated makes no second set", TestRetransmission, ""},
	{"D1.05", "a refresh moves the lifetime of the SAs", peerRefreshMovesLifetime, ""},
	{"D1.06", "answers bear the address of the socket that was used", peerOwnAddresses, ""},
	{"D1.07", "both ends of an SA are of one family", peerFamilies, ""},
	{"D1.08a", "a REGISTER that is lost on the way to the core is sent again", TestCoreSilent, ""},
	{"D1.08b", "a request that is repeated is forwarded again", peerLostDatagram, ""},
	{"D1.09", "both hang up at once", peerGlare, ""},
	{"D1.10", "large requests go over TCP", TestLargeRequestToUE, "bench/e2e:TestLargeDatagrams"},

	// D2: what Ella IMS chose.
	{"D2.01", "4 min, 128 s, 30 s and three sets", peerAwaitAuthConfigured, "control/config:TestExampleIsTheDefault"},
	{"D2.02", "a challenge removes the temporary sets before it", peerRepeatedChallenges, ""},
	{"D2.03", "a phone that restarts gets its set", peerRebootSamePorts, ""},
	{"D2.04", "answers leave from port-pc of the set that the request came on", peerAnswerOnSetOfRequest, ""},
	{"D2.05", "the first message on the new set shortens the old one", peerOldSetUntilNewIsUsed, ""},
	{"D2.06", "SPI 0 and values that contradict each other are refused", peerSanity, ""},
	{"D2.07", "the kernel is asked for each algorithm at the start", nil, "dataplane/xfrm:TestProbe"},
}

// notOurs are the rows that no test of a front end can show, with the reason.
var notOurs = map[string]string{
	"B3.17": "Rx and N5 are interfaces of the P-CSCF behind us",
	"B5.01": "no TLS listener yet",
	"B5.08": "no HEP export yet",
	"B5.09": "no HEP export yet",
	"B5.10": "no TLS listener yet: neither server names nor the PROXY protocol",
	"B5.12": "no TLS listener yet: no certificate to bind to an identity",
	"C1.05": "the Diameter interface of the core",
}

// peerParts says how many rows each section has, and how many cases the table makes of them: a case that is taken out, or
// comes in, has to be noted here.
var peerParts = map[string]struct{ rows, cases int }{
	"A1": {35, 58},
	"A2": {3, 3},
	"A3": {10, 18},
	"A4": {17, 29},
	"B1": {26, 27},
	"B2": {22, 27},
	"B3": {21, 21},
	"B4": {11, 11},
	"B5": {12, 7},
	"C1": {10, 11},
	"C2": {18, 19},
	"D1": {10, 11},
	"D2": {7, 7},
}

// Each row by its name: go test -run TestPeers/B2.05.
func TestPeers(t *testing.T) {
	known := make(map[string]map[string][]string)
	for _, row := range slices.Concat(kamailio, opensips, reports, siblings) {
		t.Run(row.id+" "+row.says, func(t *testing.T) {
			if row.run == nil && row.see == "" {
				t.Fatal("nothing shows it")
			}
			if row.see != "" {
				for ref := range strings.SplitSeq(row.see, ", ") {
					checkReference(t, known, row.id, ref)
				}
			}
			if row.run != nil {
				row.run(t)
			}
		})
	}
}

// checkReference verifies that a test of another package exists, runs the part that is named, and bears the row in its
// comment.
func checkReference(t *testing.T, known map[string]map[string][]string, id, ref string) {
	t.Helper()
	pkg, name, _ := strings.Cut(ref, ":")
	name, part, _ := strings.Cut(name, "/")
	tests, ok := known[pkg]
	if !ok {
		tests = testsOf(t, pkg)
		known[pkg] = tests
	}
	words, ok := tests[name]
	switch {
	case !ok:
		t.Errorf("package %s has no %s", pkg, name)
	case part != "" && !slices.Contains(words, part):
		t.Errorf("%s of package %s has no part %q", name, pkg, part)
	case !slices.Contains(words, id):
		t.Errorf("the comment of %s in package %s does not name %s", name, pkg, id)
	}
}

// testsOf parses the tests of a package of the module: their string literals, and the rows that their comments name.
func testsOf(t *testing.T, pkg string) map[string][]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", "..", filepath.FromSlash(pkg), "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no tests in package %s: %v", pkg, err)
	}
	tests := make(map[string][]string)
	for _, file := range files {
		f, err := parser.ParseFile(gotoken.NewFileSet(), file, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatalf("parse %s: %v", file, err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv != nil || !strings.HasPrefix(fn.Name.Name, "Test") {
				continue
			}
			_, rows, _ := strings.Cut(fn.Doc.Text(), "Peers: ")
			words := strings.FieldsFunc(rows, func(r rune) bool { return strings.ContainsRune(" ,\n", r) })
			ast.Inspect(fn, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == gotoken.STRING {
					if s, err := strconv.Unquote(lit.Value); err == nil {
						words = append(words, s)
					}
				}
				return true
			})
			tests[fn.Name.Name] = words
		}
	}
	return tests
}

// The table has every row once, in order, and as many cases as are noted.
func TestPeersAreComplete(t *testing.T) {
	ours := make(map[string]bool)
	cases := make(map[string]int)
	last := ""
	for _, row := range slices.Concat(kamailio, opensips, reports, siblings) {
		if row.id <= last {
			t.Errorf("%s stands after %s", row.id, last)
		}
		if row.says == "" {
			t.Errorf("%s says nothing", row.id)
		}
		last = row.id
		section, _, _ := strings.Cut(row.id, ".")
		cases[section]++
		ours[strings.TrimRight(row.id, "abcdefgh")] = true
	}
	for id := range notOurs {
		if ours[id] {
			t.Errorf("%s is both ours and not", id)
		}
	}
	for section, want := range peerParts {
		for n := 1; n <= want.rows; n++ {
			if id := fmt.Sprintf("%s.%02d", section, n); !ours[id] && notOurs[id] == "" {
				t.Errorf("%s is missing", id)
			}
		}
		if cases[section] != want.cases {
			t.Errorf("%d cases in %s, %d are noted", cases[section], section, want.cases)
		}
	}
	for section := range cases {
		if _, ok := peerParts[section]; !ok {
			t.Errorf("section %s is not noted", section)
		}
	}
	if n := len(ours) + len(notOurs); n != rowsOf(peerParts) {
		t.Errorf("%d rows, %d are noted", n, rowsOf(peerParts))
	}
}

func rowsOf(parts map[string]struct{ rows, cases int }) (n int) {
	for _, p := range parts {
		n += p.rows
	}
	return n
}
