package reginfo

// Documents as S-CSCFs of several makes write them.
const (
	// Kamailio, as in docker_open5gs: tabs, no schema location, ids are memory addresses, one contact under every identity
	// of the implicit set with the same id, values of parameters quoted or not.
	kamailioFull = "<?xml version=\"1.0\"?>\n" +
		"<reginfo xmlns=\"urn:ietf:params:xml:ns:reginfo\" version=\"0\" state=\"full\">\n" +
		"\t<registration aor=\"sip:001010000000001@ims.example\" id=\"0x7f8844b8f5a8\" state=\"active\">\n" +
		"\t\t<contact id=\"0x7f8844b9e9e0\" state=\"active\" event=\"registered\" expires=\"599999\" q=\"0.500\" callid=\"reg1@10.45.0.7\">\n" +
		"\t\t\t<uri>sip:001010000000001@10.45.0.7:6300;alias=10.45.0.7~6300~1</uri>\n" +
		"\t\t<unknown-param name=\"+sip.instance\">\"&lt;urn:gsma:imei:35175605-123456-0&gt;\"</unknown-param>\n" +
		"\t\t<unknown-param name=\"reg-id\">\"1\"</unknown-param>\n" +
		"\t\t<unknown-param name=\"+g.3gpp.smsip\"></unknown-param>\n" +
		"\t\t</contact>\n" +
		"\t</registration>\n" +
		"\t<registration aor=\"tel:+15550100001\" id=\"0x7f8844b8f6b0\" state=\"active\">\n" +
		"\t\t<contact id=\"0x7f8844b9e9e0\" state=\"active\" event=\"registered\" expires=\"599999\" q=\"0.500\" callid=\"reg1@10.45.0.7\">\n" +
		"\t\t\t<uri>sip:001010000000001@10.45.0.7:6300;alias=10.45.0.7~6300~1</uri>\n" +
		"\t\t</contact>\n" +
		"\t</registration>\n" +
		"</reginfo>\n"

	// Kamailio after a Registration-Termination-Request of the HSS: full again, expires of what has ended below zero in
	// some versions.
	kamailioGone = "<?xml version=\"1.0\"?>\n" +
		"<reginfo xmlns=\"urn:ietf:params:xml:ns:reginfo\" version=\"1\" state=\"full\">\n" +
		"\t<registration aor=\"sip:001010000000001@ims.example\" id=\"0x7f8844b8f5a8\" state=\"terminated\">\n" +
		"\t\t<contact id=\"0x7f8844b9e9e0\" state=\"terminated\" event=\"unregistered\" expires=\"-3\">\n" +
		"\t\t\t<uri>sip:001010000000001@10.45.0.7:6300;alias=10.45.0.7~6300~1</uri>\n" +
		"\t\t</contact>\n" +
		"\t</registration>\n" +
		"\t<registration aor=\"tel:+15550100001\" id=\"0x7f8844b8f6b0\" state=\"terminated\">\n" +
		"\t\t<contact id=\"0x7f8844b9e9e0\" state=\"terminated\" event=\"unregistered\" expires=\"0\">\n" +
		"\t\t\t<uri>sip:001010000000001@10.45.0.7:6300;alias=10.45.0.7~6300~1</uri>\n" +
		"\t\t</contact>\n" +
		"\t</registration>\n" +
		"</reginfo>\n"

	// OpenIMSCore: an implicit set of three identities of which the UE registered one; the others are "created".
	openIMS = `<?xml version="1.0"?>
<reginfo xmlns="urn:ietf:params:xml:ns:reginfo" version="7" state="full">
	<registration aor="sip:alice@open-ims.test" id="0xb4d2f0c8" state="active">
		<contact id="0xb4d2f3a0" state="active" event="registered" expires="3600">
			<uri>sip:alice@192.0.2.7:6300;transport=udp</uri>
			<unknown-param name="+g.3gpp.cs-voice"></unknown-param>
		</contact>
	</registration>
	<registration aor="sip:alice.work@open-ims.test" id="0xb4d2f1d0" state="active">
		<contact id="0xb4d2f3a0" state="active" event="created" expires="3600">
			<uri>sip:alice@192.0.2.7:6300;transport=udp</uri>
		</contact>
	</registration>
	<registration aor="tel:+49301234567" id="0xb4d2f2d8" state="active">
		<contact id="0xb4d2f3a0" state="active" event="created" expires="3600">
			<uri>sip:alice@192.0.2.7:6300;transport=udp</uri>
		</contact>
	</registration>
</reginfo>`

	// The extensions of RFC 5628 and TS 24.229, attributes of other namespaces, space around the URI.
	gruu = `<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<reginfo xmlns="urn:ietf:params:xml:ns:reginfo"
         xmlns:gr="urn:ietf:params:xml:ns:gruuinfo"
         xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
         xmlns:ere="urn:3gpp:ns:extRegExp:1.0"
         xsi:schemaLocation="urn:ietf:params:xml:ns:reginfo reginfo.xsd"
         version="0" state="full">
  <!-- one device -->
  <registration aor="sip:bob@home1.example" id="a7" state="active" ere:state="odd">
    <contact id="76" state="active" event="registered" duration-registered="7322" expires="3278" q="0.8"
             callid="c1@[2001:db8::7]" cseq="54301">
      <uri>
        sip:[2001:db8::7]:6300;comp=sigcomp
      </uri>
      <display-name xml:lang="en">Bob &amp; &quot;Co&quot;</display-name>
      <unknown-param name="+sip.instance">"&lt;urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6&gt;"</unknown-param>
      <unknown-param name="reg-id">2</unknown-param>
      <gr:pub-gruu uri="sip:bob@home1.example;gr=urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6"/>
      <gr:temp-gruu uri="sip:tgruu.7hs@home1.example;gr" first-cseq="54301"/>
      <ere:uri>sip:not-this-one@home1.example</ere:uri>
      <later><uri>sip:nor-this@home1.example</uri></later>
    </contact>
    <ere:wildcardedIdentity>sip:b!.*!@home1.example</ere:wildcardedIdentity>
  </registration>
</reginfo>`

	// Everything with a prefix, and another default namespace that must not be mistaken for ours.
	prefixed = `<r:reginfo xmlns:r="urn:ietf:params:xml:ns:reginfo" xmlns="urn:example:other" version="2" state="partial">` +
		`<registration aor="sip:other@x.example" id="9" state="active"/>` +
		`<r:registration aor="sip:bob@home1.example" id="a7" state="active">` +
		`<r:contact id="76" state="active" event="shortened" expires="60"><r:uri>sip:bob@192.0.2.9</r:uri>` +
		`<uri>sip:mallory@192.0.2.66</uri></r:contact>` +
		`</r:registration></r:reginfo>`

	// What is required but was left out all the same: no XML declaration, namespace, version, ids or event.
	bare = "\xef\xbb\xbf<reginfo state=\"full\"><registration aor=\"sip:a@x.example\" state=\"active\">" +
		"<contact state=\"active\"><uri>sip:a@192.0.2.1</uri></contact></registration></reginfo>\r\n\r\n"
)
