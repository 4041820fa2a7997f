package observe

import "fmt"

// Reason says why a message was answered with an error (sip_rejected_total) or thrown away (sip_drops_total).
type Reason uint8

// Reasons. A new one also needs its row in reasonNames.
const (
	ReasonMalformed            Reason = iota + 1 // not a SIP message, or one without what RFC 3261 §8.1.1 demands
	ReasonUnprotectedRequest                     // anything but REGISTER on the unprotected port
	ReasonUnprotectedResponse                    // a response on the unprotected port
	ReasonNoSA                                   // on a protected port from a source without an SA set
	ReasonTemporaryNonRegister                   // anything but REGISTER over a temporary set
	ReasonNotOwner                               // an identity that the owner of the SA set has not registered
	ReasonVerifyMismatch                         // Security-Verify is not what we sent (RFC 3329 §2.3.1)
	ReasonClientMismatch                         // Security-Client of the protected REGISTER differs from the first one
	ReasonNoSecurityClient                       // REGISTER without Security-Client
	ReasonNoSecAgree                             // REGISTER without Require and Proxy-Require: sec-agree
	ReasonBadSecurityClient                      // no entry of Security-Client can be used
	ReasonNoCommonAlgorithm                      // the UE offers no pair that we allow
	ReasonAddressConflict                        // the address belongs to another UE's live set
	ReasonBadExtension                           // Proxy-Require names what we do not support
	ReasonMaxForwards                            // Max-Forwards has run out
	ReasonForgedToken                            // flow token that we did not make
	ReasonStaleToken                             // flow token of a registration that is gone
	ReasonUEUnreachable                          // no way to the UE: no SA set, or its port refuses
	ReasonCoreUnreachable                        // no next hop of the core can be reached
	ReasonCoreTimeout                            // the core did not answer
	ReasonChallengeWithoutKeys                   // 401 of the core without ck and ik
	ReasonInstallFailed                          // the backend refused the SA set
	ReasonSPIExhausted                           // no free SPI
	ReasonPortExhausted                          // no port-pc that differs from the UE's live sets
	ReasonRouteNotAllowed                        // the request wants to go where UEs may not send
	ReasonUnknownResponse                        // response to nothing that we forwarded
	ReasonNotRegistered                          // request of a UE without registration
	ReasonViaMismatch                            // bottom Via does not name the UE's protected port
	ReasonSourceAddress                          // source address is not the SA set's
	ReasonTooLarge                               // longer than gm.max_message
	ReasonFraming                                // TCP stream that cannot be cut into messages
	ReasonEditFailed                             // the message could not be rewritten
	ReasonSendFailed                             // the socket refused the message
	ReasonLoop                                   // the request has been here before
	ReasonUnknownRequest                         // CANCEL or ACK that belongs to nothing
	ReasonTooManySets                            // the UE holds security.max_sets_per_ue sets already
	ReasonBusy                                   // a registration of this UE is already under way
	ReasonKeepalive                              // CRLF keep-alive, answered by the transport (RFC 5626 §4.4.1)
	ReasonPolicy                                 // the operator's policy does not let this phone register so
	ReasonDowngrade                              // registration in clear of an identity that has SAs
	ReasonLabelMismatch                          // the ESP backend's mark names another SA than the addresses and ports do

	reasonEnd // one past the last
)

var reasonNames = [reasonEnd]string{
	ReasonMalformed:            "malformed",
	ReasonUnprotectedRequest:   "unprotected_request",
	ReasonUnprotectedResponse:  "unprotected_response",
	ReasonNoSA:                 "no_sa",
	ReasonTemporaryNonRegister: "temporary_non_register",
	ReasonNotOwner:             "not_owner",
	ReasonVerifyMismatch:       "verify_mismatch",
	ReasonClientMismatch:       "client_mismatch",
	ReasonNoSecurityClient:     "no_security_client",
	ReasonNoSecAgree:           "no_sec_agree",
	ReasonBadSecurityClient:    "bad_security_client",
	ReasonNoCommonAlgorithm:    "no_common_algorithm",
	ReasonAddressConflict:      "address_conflict",
	ReasonBadExtension:         "bad_extension",
	ReasonMaxForwards:          "max_forwards",
	ReasonForgedToken:          "forged_token",
	ReasonStaleToken:           "stale_token",
	ReasonUEUnreachable:        "ue_unreachable",
	ReasonCoreUnreachable:      "core_unreachable",
	ReasonCoreTimeout:          "core_timeout",
	ReasonChallengeWithoutKeys: "challenge_without_keys",
	ReasonInstallFailed:        "install_failed",
	ReasonSPIExhausted:         "spi_exhausted",
	ReasonPortExhausted:        "port_exhausted",
	ReasonRouteNotAllowed:      "route_not_allowed",
	ReasonUnknownResponse:      "unknown_response",
	ReasonNotRegistered:        "not_registered",
	ReasonViaMismatch:          "via_mismatch",
	ReasonSourceAddress:        "source_address",
	ReasonTooLarge:             "too_large",
	ReasonFraming:              "framing",
	ReasonEditFailed:           "edit_failed",
	ReasonSendFailed:           "send_failed",
	ReasonLoop:                 "loop",
	ReasonUnknownRequest:       "unknown_request",
	ReasonTooManySets:          "too_many_sets",
	ReasonBusy:                 "busy",
	ReasonKeepalive:            "keepalive",
	ReasonPolicy:               "policy",
	ReasonDowngrade:            "downgrade",
	ReasonLabelMismatch:        "label_mismatch",
}

// String returns the label value.
func (r Reason) String() string {
	if r == 0 || r >= reasonEnd {
		return fmt.Sprintf("Reason(%#x)", uint8(r))
	}
	return reasonNames[r]
}
