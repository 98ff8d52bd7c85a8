// Inspect one image with the bundle of a default model, without Python: the graph by OpenVINO, the thresholds from bundle.json.
//
//   inspect.exe BUNDLE IMAGE.ppm
//
// The image is a binary PPM (P6) of the input size of the bundle; `normweave predict` also resizes, tiles and draws maps.
// Exit code: 0 normal, 1 anomalous or unknown, 2 an error.
using System;
using System.IO;
using System.Json;
using System.Linq;
using System.Runtime.InteropServices;
using System.Text;

static class Program {
    const string Library = "openvino_c";  // the C interface of OpenVINO; each function returns 0, or the number of an error
    [StructLayout(LayoutKind.Sequential)] struct Shape { public long Rank; public IntPtr Sizes; }
    [DllImport(Library)] static extern int ov_core_create(out IntPtr core);
    [DllImport(Library)] static extern int ov_core_compile_model_from_file(
        IntPtr core, string path, string device, UIntPtr texts, out IntPtr model, string key, string value);
    [DllImport(Library)] static extern int ov_compiled_model_create_infer_request(IntPtr model, out IntPtr request);
    [DllImport(Library)] static extern int ov_infer_request_get_tensor(IntPtr request, string name, out IntPtr tensor);
    [DllImport(Library)] static extern int ov_infer_request_infer(IntPtr request);
    [DllImport(Library)] static extern int ov_tensor_set_shape(IntPtr tensor, Shape shape);
    [DllImport(Library)] static extern int ov_tensor_data(IntPtr tensor, out IntPtr data);

    static void Check(int status, string what) {
        if (status != 0) throw new Exception("OpenVINO cannot " + what + ": error " + status);
    }

    // Return the address of the values of an input or output, of which an input first gets its shape.
    static IntPtr Data(IntPtr request, string name, params long[] sizes) {
        Check(ov_infer_request_get_tensor(request, name, out var tensor), "find " + name);
        var pinned = GCHandle.Alloc(sizes, GCHandleType.Pinned);
        if (sizes.Length > 0)
            Check(ov_tensor_set_shape(tensor, new Shape { Rank = sizes.Length, Sizes = pinned.AddrOfPinnedObject() }), "shape " + name);
        pinned.Free();
        Check(ov_tensor_data(tensor, out var data), "read " + name);
        return data;
    }

    // Read pixels (height, width, 3) as the graph needs them, (3, height, width).
    static byte[] ReadImage(string path, int height, int width) {
        var content = File.ReadAllBytes(path);
        var header = Encoding.ASCII.GetString(content, 0, Math.Min(content.Length, 64)).Split(new[] { ' ', '\n' }, 5);
        if (header.Length < 5 || !header.Take(4).SequenceEqual(new[] { "P6", "" + width, "" + height, "255" }))
            throw new Exception(path + " must be a binary PPM of " + width + " x " + height);
        int start = header.Take(4).Sum(each => each.Length + 1), places = height * width;
        if (content.Length < start + 3 * places) throw new Exception(path + " is cut off");
        return Enumerable.Range(0, 3 * places).Select(at => content[start + 3 * (at % places) + at / places]).ToArray();
    }

    // Find the operating point of a subclass; null is the one of all subclasses together.
    static JsonValue PointOf(JsonValue calibration, string subclass) =>
        ((JsonArray)calibration["operating_points"]).First(each => (string)each["subclass"] == subclass);

    static int Inspect(string bundle, string image) {
        var record = JsonValue.Parse(File.ReadAllText(bundle + "/bundle.json"));
        if (record["categories"].Count != 1 || record["config"]["regions"].Count != 0)
            throw new Exception("this example is for one category without a region of interest");
        int height = record["preparation"]["height"], width = record["preparation"]["width"];
        Check(ov_core_create(out var core), "start");
        Check(ov_core_compile_model_from_file(core, bundle + "/model.onnx", "CPU", (UIntPtr)2, out var model,
            "INFERENCE_PRECISION_HINT", "f32"), "load the graph");  // else some processors round to 16 bits
        Check(ov_compiled_model_create_infer_request(model, out var request), "make a request");
        var pixels = ReadImage(image, height, width);
        Marshal.Copy(pixels, 0, Data(request, "pixels", 1, 3, height, width), pixels.Length);
        Marshal.WriteInt64(Data(request, "excluded", 1), -1);
        Check(ov_infer_request_infer(request), "compute the graph");
        var values = new float[2];
        Marshal.Copy(Data(request, "image_scores"), values, 0, 1);
        Marshal.Copy(Data(request, "distance"), values, 1, 1);
        double score = values[0], distance = values[1];
        string subclass = record["subclass_names"][(int)Marshal.ReadInt64(Data(request, "subclass"))];
        var point = PointOf(record["calibration"], subclass);
        var unseen = record["calibration"]["unseen"];
        bool far = distance > (double)point["unknown_beyond"];
        if (far && unseen != null) point = PointOf(unseen, null);
        bool unknown = far && (unseen == null || distance > (double)point["unknown_beyond"]);
        var verdict = unknown ? "unknown" : score > (double)point["threshold"] ? "anomalous" : "normal";
        Console.WriteLine(new JsonObject {
            { "verdict", verdict }, { "pred_score", score }, { "threshold", point["threshold"] }, { "subclass", subclass }
        }.ToString());
        return verdict == "normal" ? 0 : 1;
    }

    static int Main(string[] arguments) {
        try {
            if (arguments.Length != 2) throw new Exception("usage: inspect.exe BUNDLE IMAGE.ppm");
            return Inspect(arguments[0], arguments[1]);
        } catch (Exception error) {
            Console.Error.WriteLine(error.Message);
            return 2;
        }
    }
}
