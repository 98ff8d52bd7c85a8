// A client of node-opcua: it follows the events, acknowledges each result, and prints the ids as JSON lines.
// node opcua_client.js URL USERNAME PASSWORD COUNT
const opcua = require("node-opcua-client");

const [url, userName, password, count] = process.argv.slice(2);
const NAMESPACE = "urn:normweave:line";

async function main() {
  const client = opcua.OPCUAClient.create({
    endpointMustExist: false,
    securityMode: opcua.MessageSecurityMode.None,
    securityPolicy: opcua.SecurityPolicy.None,
    connectionStrategy: { maxRetry: 3, initialDelay: 100 },
  });
  await client.connect(url);
  const session = await client.createSession({ type: opcua.UserTokenType.UserName, userName, password });
  const index = (await session.readNamespaceArray()).indexOf(NAMESPACE);
  const find = async (path) => {
    const found = await session.translateBrowsePath(opcua.makeBrowsePath("RootFolder", path));
    if (!found.statusCode.isGood()) throw new Error(`${path}: ${found.statusCode}`);
    return found.targets[0].targetId;
  };
  const system = await find(`/Objects/${index}:VisionSystem`);
  const results = await find(`/Objects/${index}:VisionSystem/${index}:ResultManagement`);
  const ready = await session.read({ nodeId: `ns=${index};s=Ready`, attributeId: opcua.AttributeIds.Value });
  console.log(JSON.stringify({ ready: ready.value.value }));
  const subscription = await session.createSubscription2({
    requestedPublishingInterval: 20, requestedLifetimeCount: 1000, requestedMaxKeepAliveCount: 10,
    maxNotificationsPerPublish: 100, publishingEnabled: true, priority: 1,
  });
  const eventType = opcua.resolveNodeId("BaseEventType");
  const fields = ["EventType", "ResultId", "InspectionId", "VerdictCode"];
  const selectClauses = fields.map((name, place) => new opcua.SimpleAttributeOperand({
    typeDefinitionId: eventType, attributeId: opcua.AttributeIds.Value,
    browsePath: [{ namespaceIndex: place === 0 ? 0 : index, name }],
  }));
  const item = await subscription.monitor(
    { nodeId: system, attributeId: opcua.AttributeIds.EventNotifier },
    { samplingInterval: 0, queueSize: 100, discardOldest: true, filter: new opcua.EventFilter({ selectClauses }) },
    opcua.TimestampsToReturn.Both,
  );
  let seen = 0;
  await new Promise((resolve, reject) => item.on("changed", async (event) => {
    try {
      const [, result, inspection, verdict] = event.map((field) => field.value);
      const answer = await session.call({
        objectId: results, methodId: `ns=${index};s=AcknowledgeResults`,
        inputArguments: [{ dataType: opcua.DataType.String, arrayType: opcua.VariantArrayType.Array, value: [result] }],
      });
      console.log(JSON.stringify({ result, inspection, verdict, status: answer.statusCode.name }));
      if (++seen === Number(count)) resolve();
    } catch (error) {
      reject(error);
    }
  }));
  await session.close();
  await client.disconnect();
}

main().catch((error) => { console.error(error); process.exit(1); });
