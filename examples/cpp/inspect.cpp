// Inspect one image with the bundle of a default model, without Python: the graph by OpenVINO, the thresholds from bundle.json.
//
//   inspect BUNDLE IMAGE.ppm
//
// The image is a binary PPM (P6) of the input size of the bundle; `normweave predict` also resizes, tiles and draws maps.
// Exit code: 0 normal, 1 anomalous or unknown, 2 an error.
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

using nlohmann::json;

// Read pixels (height, width, 3) as the graph needs them, (1, 3, height, width).
ov::Tensor read_image(const std::string& path, size_t height, size_t width) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    size_t columns = 0, rows = 0, maximum = 0;
    file >> magic >> columns >> rows >> maximum;
    file.get();
    if (magic != "P6" || maximum != 255 || rows != height || columns != width)
        throw std::runtime_error(path + " must be a binary PPM of " + std::to_string(width) + " x " + std::to_string(height));
    std::vector<char> pixels(rows * columns * 3);
    if (!file.read(pixels.data(), static_cast<std::streamsize>(pixels.size()))) throw std::runtime_error(path + " is cut off");
    ov::Tensor input(ov::element::u8, {1, 3, height, width});
    auto* values = input.data<uint8_t>();
    for (size_t place = 0; place < rows * columns; ++place)
        for (size_t channel = 0; channel < 3; ++channel)
            values[channel * rows * columns + place] = static_cast<uint8_t>(pixels[3 * place + channel]);
    return input;
}

// Find the operating point of a subclass; a null name is the one of all subclasses together.
json point_of(const json& calibration, const json& subclass) {
    for (const auto& point : calibration.at("operating_points"))
        if (point.at("subclass") == subclass) return point;
    throw std::runtime_error("bundle.json has no operating point of " + subclass.dump());
}

int main(int count, char** arguments) try {
    if (count != 3) throw std::runtime_error("usage: inspect BUNDLE IMAGE.ppm");
    const std::string bundle = arguments[1];
    std::ifstream file(bundle + "/bundle.json");
    if (!file) throw std::runtime_error(bundle + " is no bundle");
    const json record = json::parse(file);
    if (record.at("categories").size() != 1 || !record.at("config").value("regions", json::object()).empty())
        throw std::runtime_error("this example is for one category without a region of interest");
    const auto& prepare = record.at("preparation");
    ov::Core core;
    const auto precise = ov::hint::inference_precision(ov::element::f32);  // else some processors round to 16 bits
    auto request = core.compile_model(bundle + "/model.onnx", "CPU", precise).create_infer_request();
    request.set_tensor("pixels", read_image(arguments[2], prepare.at("height"), prepare.at("width")));
    ov::Tensor nothing_left_out(ov::element::i64, {1});
    nothing_left_out.data<int64_t>()[0] = -1;
    request.set_tensor("excluded", nothing_left_out);
    request.infer();
    const double score = request.get_tensor("image_scores").data<float>()[0];
    const double distance = request.get_tensor("distance").data<float>()[0];
    const auto& subclass = record.at("subclass_names").at(request.get_tensor("subclass").data<int64_t>()[0]);
    auto point = point_of(record.at("calibration"), subclass);
    const bool far = distance > point.at("unknown_beyond").get<double>();
    const auto& unseen = record.at("calibration").at("unseen");
    if (far && !unseen.is_null()) point = point_of(unseen, nullptr);
    const bool unknown = far && (unseen.is_null() || distance > point.at("unknown_beyond").get<double>());
    const double threshold = point.at("threshold");
    const std::string verdict = unknown ? "unknown" : score > threshold ? "anomalous" : "normal";
    std::cout << json{{"verdict", verdict}, {"pred_score", score}, {"threshold", threshold}, {"subclass", subclass}} << "\n";
    return verdict == "normal" ? 0 : 1;
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
}
